"""Variables: ours before vLLM's, a flag before both, and no silence about one that nothing reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo.config.args import EngineArgs
from octavo.config.env import ELSEWHERE, VARIABLES, Environment, apply_environment, read_environment
from octavo.config.server import ServerConfig
from octavo.config.setting import settings_of
from octavo.errors import ConfigError


def test_nothing_set_says_nothing() -> None:
    assert read_environment({"PATH": "/bin", "HF_HOME": "/x"}) == Environment()


def test_our_name_wins_over_vllms_and_it_is_said() -> None:
    environment = read_environment({"OCTAVO_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_LEVEL": "error"})
    assert environment.logging_level == "debug"
    assert environment.notes == ("Read from the environment: OCTAVO_LOGGING_LEVEL=DEBUG (over VLLM_LOGGING_LEVEL).",)


def test_vllms_name_is_honoured() -> None:
    environment = read_environment({"VLLM_ATTENTION_BACKEND": "TORCH_SDPA", "VLLM_CPU_KVCACHE_SPACE": "0.5"})
    args = apply_environment(EngineArgs(), environment)
    assert args.attention_backend == "TORCH_SDPA"
    assert args.kv_cache_memory_bytes == 2**29


def test_a_flag_wins_over_the_environment() -> None:
    environment = read_environment({"OCTAVO_ATTENTION_BACKEND": "a", "OCTAVO_CPU_KVCACHE_SPACE": "1"})
    args = EngineArgs(attention_backend="b", kv_cache_memory_bytes=5)
    assert apply_environment(args, environment) == args


def test_a_flag_wins_even_if_it_says_the_default() -> None:
    environment = read_environment({"VLLM_ATTENTION_BACKEND": "a", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})
    args = EngineArgs(attention_backend="auto", allow_long_max_model_len=False)
    assert apply_environment(args, environment) == args


def test_the_space_for_a_cpu_is_not_for_a_gpu() -> None:
    environment = read_environment({"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert apply_environment(EngineArgs(device="cuda"), environment).kv_cache_memory_bytes is None


def test_long_contexts_may_be_allowed_by_variable() -> None:
    environment = read_environment({"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})
    assert apply_environment(EngineArgs(), environment).allow_long_max_model_len


def test_variables_that_nothing_reads_are_named() -> None:
    notes = read_environment({"VLLM_USE_V1": "1", "VLLM_FOO": "", "OCTAVO_LOGGING_LEVELS": "info"}).notes
    assert notes[0] == "Set but without effect in Octavo: VLLM_FOO, VLLM_USE_V1."
    assert not read_environment({"OCTAVO_NATIVE_KERNELS": "0", "OCTAVO_KERNELS_PDL": "0"}).notes, "read elsewhere"
    assert notes[1] == "Unknown environment variable OCTAVO_LOGGING_LEVELS. Did you mean OCTAVO_LOGGING_LEVEL?"


@pytest.mark.parametrize(
    ("name", "value"),
    [("OCTAVO_LOGGING_LEVEL", "loud"), ("VLLM_LOG_STATS_INTERVAL", "0"), ("OCTAVO_CPU_KVCACHE_SPACE", "x")],
)
def test_an_impossible_value_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_environment({name: value})


def test_at_most_ten_variables() -> None:
    assert len(VARIABLES) <= 10


def test_each_is_on_the_page_about_settings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `OCTAVO_([A-Z_]+)`", page, re.MULTILINE))
    assert told == {*VARIABLES, *ELSEWHERE}
    flags = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)", page)}
    assert flags <= {*settings_of(EngineArgs), *settings_of(ServerConfig), "config", "help", "bench"}

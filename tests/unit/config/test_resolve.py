"""resolve() settles every auto with a reason, and refuses what cannot go together."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.config.args import EngineArgs
from octavo.config.engine import Decision, EngineConfig
from octavo.config.kv_cache_size import size_kv_cache
from octavo.config.model import RopeConfig
from octavo.config.resolve import resolve
from octavo.errors import ConfigError, OctavoError

from .conftest import GIB, make_hardware, make_model, make_report


def settle(located: Any, model: Any = None, hardware: Any = None, **given_args: Any) -> EngineConfig:
    return resolve(EngineArgs(**given_args), located, model or make_model(), hardware or make_hardware())[0]


def reasons(notes: list[Decision]) -> dict[str, str]:
    return {note.field: note.reason for note in notes}


def test_every_auto_becomes_a_value_with_a_reason(located: Any) -> None:
    config, notes = resolve(EngineArgs(), located, make_model(), make_hardware())
    assert config.device.dtype == "float32"
    assert config.device.num_threads == 8
    assert config.device.depth == 1
    assert config.cache.kv_cache_dtype == "float32"
    assert config.cache.block_size == 16
    assert config.scheduler.max_model_len == 2048
    assert config.scheduler.max_num_batched_tokens >= config.scheduler.max_num_seqs
    assert config.load.load_format == "safetensors"
    assert config.frontend.tokenizer == "/models/tiny"
    decided = reasons(notes)
    for field in ("dtype", "num_threads", "max_model_len", "block_size", "kv_cache_dtype", "max_num_seqs",
                  "max_num_batched_tokens", "load_format", "quantization", "async_scheduling", "device"):  # fmt: skip
        assert decided[field], field
    # What exists of these is known to the device half only; its registries choose, with reasons of their own.
    shown = (
        str(dataclasses.asdict(config)).replace("'attention_backend': 'auto'", "").replace("'model_impl': 'auto'", "")
    )
    assert "auto" not in shown


def test_what_the_user_gave_is_taken_and_not_explained(located: Any) -> None:
    args = EngineArgs(dtype="half", num_threads=3, max_model_len=100, block_size=32, max_num_seqs=4, seed=7,
                      max_num_batched_tokens=64, kv_cache_dtype="bfloat16", async_scheduling=True, model="x",
                      attention_backend="torch_sdpa", served_model_name=("a", "b"), device="cpu")  # fmt: skip
    config, notes = resolve(args, located, make_model(), make_hardware())
    assert (config.device.dtype, config.device.num_threads, config.device.depth) == ("float16", 3, 2)
    assert (config.scheduler.max_model_len, config.scheduler.max_num_seqs) == (100, 4)
    assert (config.cache.block_size, config.cache.kv_cache_dtype) == (32, "bfloat16")
    assert (config.frontend.served_model_names, config.frontend.seed, config.load.seed) == (("a", "b"), 7, 7)
    assert set(reasons(notes)) == {"load_format", "quantization"}


@pytest.mark.parametrize(
    ("device_type", "supports_bfloat16", "checkpoint", "expected"),
    [
        ("cpu", True, "bfloat16", "float32"),
        ("cpu with amx_bf16", True, "bfloat16", "bfloat16"),
        ("cpu with amx_bf16", True, "float16", "float32"),
        ("cuda", True, "bfloat16", "bfloat16"),
        ("cuda", False, "bfloat16", "float16"),
        ("cuda", True, "float16", "float16"),
        ("cuda", True, "float32", "bfloat16"),
    ],
)
def test_dtype_by_device_and_checkpoint(
    located: Any, device_type: str, supports_bfloat16: bool, checkpoint: str, expected: str
) -> None:
    device_type, _, feature = device_type.partition(" with ")
    hardware = make_hardware(device_type, supports_bfloat16=supports_bfloat16, features=(feature,))
    assert settle(located, make_model(dtype=checkpoint), hardware).device.dtype == expected


def test_batch_limits_by_device(located: Any) -> None:
    limits = {}
    for name, hardware in (
        ("cpu", make_hardware()),
        ("small", make_hardware("cuda", 24)),
        ("large", make_hardware("cuda", 80)),
    ):
        scheduler = settle(located, hardware=hardware).scheduler
        limits[name] = (scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    assert limits["small"] == (2048, 256)
    assert limits["large"] == (8192, 1024)
    assert limits["cpu"] < limits["small"]


def test_one_limit_given_the_other_follows(located: Any) -> None:
    assert settle(located, max_num_batched_tokens=10).scheduler.max_num_seqs == 10
    assert settle(located, max_num_seqs=5000).scheduler.max_num_batched_tokens == 5000
    assert settle(located, enable_chunked_prefill=False).scheduler.max_num_batched_tokens == 2048


@pytest.mark.parametrize(
    ("args", "param", "said"),
    [
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_batched_tokens", "less than max_num_seqs"),
        ({"max_num_batched_tokens": 512, "enable_chunked_prefill": False}, "max_num_batched_tokens", "chunked prefill"),
        (
            {"long_prefill_token_threshold": 9, "enable_chunked_prefill": False},
            "long_prefill_token_threshold",
            "is off",
        ),
        ({"max_model_len": 4096}, "max_model_len", "at most 2048"),
        ({"tenant_weights": {"a": 2}}, "tenant_weights", "--scheduling-policy fair"),
        ({"tenant_weights": {"a": 0}, "scheduling_policy": "fair"}, "tenant_weights['a']", "> 0"),
        ({"override_generation_config": {"temprature": 1}}, "override_generation_config", "Did you mean temperature?"),
        ({"override_generation_config": {"top_p": 2}}, "override_generation_config['top_p']", "<= 1"),
        ({"load_format": "gguf"}, "load_format", "holds safetensors"),
        ({"device": "cuda"}, "device", "found is cpu"),
    ],
)
def test_contradictions_name_the_field_and_what_is_possible(
    located: Any, args: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(located, **args)
    assert caught.value.param == param
    assert said in caught.value.message


def test_a_longer_context_than_trained_needs_a_word(located: Any) -> None:
    config, notes = resolve(
        EngineArgs(max_model_len=4096, allow_long_max_model_len=True), located, make_model(), make_hardware()
    )
    assert config.scheduler.max_model_len == 4096
    assert "beyond" in reasons(notes)["max_model_len"]


def test_quantization_of_the_checkpoint_is_kept_and_not_contradicted(located: Any) -> None:
    model = make_model(quantization={"quant_method": "AWQ"})
    assert settle(located, model).device.quantization == "awq"
    assert settle(located, model, quantization="awq").device.quantization == "awq"
    assert settle(located, quantization="int8").device.quantization == "int8"
    with pytest.raises(ConfigError, match="stored as awq"):
        settle(located, model, quantization="fp8")


def test_packed_gguf_weights_become_int8_where_that_is_fast(located: Any) -> None:
    located.format = "gguf"
    model = make_model(hf={"gguf_stored_as": "Q4_1"})
    fast = make_hardware(features=("avx2",), compiles_kernels=True)
    config, notes = resolve(EngineArgs(), located, model, fast)
    assert (config.device.quantization, config.device.dtype) == ("int8", "float32")
    assert "Q4_1" in reasons(notes)["quantization"]
    assert "--quantization none" in reasons(notes)["quantization"]
    # Who asks for float32 gets the stored values.
    for asked in ({"dtype": "float32"}, {"quantization": "none"}):
        assert settle(located, model, fast, **asked).device.quantization == "none"
    assert settle(located, model, make_hardware(compiles_kernels=True)).device.quantization == "none"
    assert settle(located, model, make_hardware(features=("avx2",))).device.quantization == "none"
    assert settle(located, make_model(), fast).device.quantization == "none"
    located.format = "safetensors"
    assert settle(located, model, fast).device.quantization == "none"


def test_sampling_defaults_come_from_the_model_and_the_override(located: Any) -> None:
    model = make_model(generation_defaults={"temperature": 0.6, "top_k": 20, "do_sample": True})
    assert settle(located, model).frontend.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert settle(located, model, generation_config="vllm").frontend.sampling_defaults == {}
    changed = settle(located, model, override_generation_config={"temperature": 1, "max_new_tokens": 9})
    assert changed.frontend.sampling_defaults == {"temperature": 1.0, "top_k": 20, "max_tokens": 9}


def test_a_folder_without_weights_is_for_dummy_ones_only() -> None:
    empty = SimpleNamespace(name="x", path="/x", format="none")
    assert settle(empty, load_format="dummy").load.load_format == "dummy"
    with pytest.raises(ConfigError, match="--load-format dummy"):
        settle(empty)


def test_no_setting_is_accepted_and_ignored() -> None:
    """Red when a field of EngineArgs is added that nothing reads."""
    package = Path(inspect.getfile(octavo)).parent
    read = set(re.findall(r"\bargs\.(\w+)", "".join(path.read_text() for path in package.rglob("*.py"))))
    assert {field.name for field in dataclasses.fields(EngineArgs)} - read == set()


# ---------------------------------------------------------------------------------------------- sizing the KV cache


def size(located: Any, available_bytes: int, hardware: Any = None, **given_args: Any) -> Any:
    args = EngineArgs(**given_args)
    config, _ = resolve(args, located, make_model(), hardware or make_hardware())
    return size_kv_cache(args, config, make_report(available_bytes, config.cache.block_size))


def test_a_gpu_takes_what_is_free_and_a_cpu_a_modest_part(located: Any) -> None:
    on_gpu = size(located, 8 * GIB, make_hardware("cuda"))
    assert on_gpu.num_blocks == 8 * GIB // (4 * 8192)  # of 64 tokens, not 16
    assert size(located, 30 * GIB).num_blocks == 4 * GIB // 8192
    assert size(located, 2 * GIB).num_blocks == 2 * GIB // 8192


def test_numbers_that_are_shown_fit_together(located: Any) -> None:
    result = size(located, 30 * GIB, num_gpu_blocks_override=257)
    assert result.num_blocks == 257
    assert result.num_tokens == 256 * 16
    assert result.max_concurrency == 2.0
    assert [note.field for note in result.decisions] == ["num_blocks"]


def test_bytes_given_outright(located: Any) -> None:
    assert size(located, GIB, kv_cache_memory_bytes="2M").num_blocks == 2**21 // 8192
    with pytest.raises(ConfigError) as caught:
        size(located, GIB, kv_cache_memory_bytes="2G")
    assert caught.value.param == "kv_cache_memory_bytes"
    assert "2.00 GiB" in caught.value.message
    assert "1.00 GiB" in caught.value.message


def test_a_cache_too_small_for_one_request_names_the_length_that_fits(located: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        size(located, 65 * 8192)
    assert "--max-model-len 1024" in caught.value.message
    assert "--gpu-memory-utilization" in caught.value.message
    # The advice is true: with it the engine starts, with one token more it does not.
    assert size(located, 65 * 8192, max_model_len=1024).max_concurrency == 1.0
    with pytest.raises(ConfigError):
        size(located, 65 * 8192, max_model_len=1025)


def test_auto_length_is_the_longest_that_fits(located: Any) -> None:
    result = size(located, 65 * 8192, max_model_len="auto")
    assert result.config.scheduler.max_model_len == 1024
    assert "max_model_len" in reasons(result.decisions)
    assert size(located, GIB, max_model_len="auto").config.scheduler.max_model_len == 2048


@pytest.mark.parametrize("available", [0, -5, 8191, 8192])
def test_no_room_at_all_is_refused_even_under_auto(located: Any, available: int) -> None:
    with pytest.raises(ConfigError, match="Not even one block fits"):
        size(located, available, max_model_len="auto")


@given(available=st.integers(-(2**20), 2**26), wanted=st.integers(1, 2048), block_size=st.sampled_from([16, 48, 256]))
def test_any_size_either_holds_one_request_or_is_refused(available: int, wanted: int, block_size: int) -> None:
    """Red when a cache is accepted in which some allowed request could never run."""
    located = SimpleNamespace(name="x", path="/x", format="gguf")
    args = EngineArgs(max_model_len=wanted, block_size=block_size)
    config, _ = resolve(args, located, make_model(), make_hardware())
    report = make_report(available, block_size)
    needed = (report.kv_spec.blocks_for_tokens(wanted) + 1) * report.kv_spec.bytes_per_block
    try:
        result = size_kv_cache(args, config, report)
    except OctavoError:
        assert needed > available
    else:
        assert needed <= available
        assert result.num_blocks * report.kv_spec.bytes_per_block <= available
        assert result.max_concurrency >= 1.0


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaling_allows_longer_texts_than_the_table_says(kind: str, located: Any) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 2048}
    model = dataclasses.replace(make_model(), rope=RopeConfig(scaling=scaling))
    assert settle(located, model).scheduler.max_model_len == 8192
    assert settle(located, model, max_model_len=4096).scheduler.max_model_len == 4096
    with pytest.raises(ConfigError, match=r"trained for 8,192 tokens"):
        settle(located, model, max_model_len=8193)

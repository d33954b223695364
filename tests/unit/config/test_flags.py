"""Flags: made from EngineArgs, read back without loss, and never a traceback whatever is typed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.config.args import EngineArgs
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from, engine_args_from_keywords, to_argv
from octavo.config.known_flags import KNOWN_FLAGS
from octavo.config.setting import settings_of
from octavo.errors import ConfigError


def make_parser() -> FlagParser:
    parser = FlagParser(prog="octavo test")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--verbose", action="store_true")
    add_engine_flags(parser)
    return parser


PARSER = make_parser()


def parse(*argv: str) -> EngineArgs:
    return engine_args_from(make_parser().parse(argv))


def refusal(*argv: str) -> str:
    """What is said before the process ends with status 2."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as caught:
        make_parser().parse(argv)
    assert caught.value.code == 2
    return stderr.getvalue()


def test_every_setting_has_a_flag() -> None:
    flags = PARSER.flags()
    assert all("--" + name.replace("_", "-") in flags for name in settings_of(EngineArgs))


def test_flags_values_and_spellings() -> None:
    args = parse("m", "--max_model_len", "1K", "--no-enable-prefix-caching", "--dtype=half", "-tp", "1",
                 "--hf_overrides", '{"a_b": 1}', "--served-model-name", "x_y", "z", "--max-logprobs", "-1")  # fmt: skip
    assert args.model == "m"
    assert args.max_model_len == 1024
    assert args.enable_prefix_caching is False
    assert args.dtype == "half"
    assert args.hf_overrides == {"a_b": 1}
    assert args.served_model_name == ("x_y", "z")
    assert args.max_logprobs == -1


def test_model_may_be_named_once() -> None:
    assert parse("--model", "a").model == "a"
    assert parse("a", "--model", "a").model == "a"
    with pytest.raises(ConfigError, match="given twice"):
        parse("b", "--model", "a")


def test_unknown_flags_are_refused_with_the_nearest_match() -> None:
    assert "unknown flag --max-modell-len. Did you mean --max-model-len?" in refusal("--max-modell-len", "3")
    assert "unknown flag --zzz" in refusal("--zzz")
    assert "unexpected argument 'b'" in refusal("a", "b")


def test_flags_of_vllm_are_honoured_warned_of_or_refused() -> None:
    parser = make_parser()
    args = engine_args_from(parser.parse(["-O2", "--swap_space", "4", "--pipeline-parallel-size=1", "m"]))
    assert args.model == "m"
    assert len(parser.notes) == 2
    assert all("has no effect here" in note for note in parser.notes)
    assert "--pipeline-parallel-size 2 is not supported" in refusal("--pipeline-parallel-size", "2")
    assert "--enable-lora is not supported" in refusal("--enable-lora", "m")
    assert "octavo serve" in refusal("--port", "80")


def test_no_flag_is_both_ours_and_known_from_elsewhere() -> None:
    ours = {name.replace("_", "-") for name in settings_of(EngineArgs)}
    assert not ours & set(KNOWN_FLAGS)


def test_config_file_is_read_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: m\nmax_model_len: 16K\nmax-num-seqs: 4\nenable_prefix_caching: false\n"
        "hf_overrides: {x: 1}\nserved-model-name: [a, b]\nseed: null\nswap-space: 4\nverbose: true\n"
        "prompt: [one, two]\n"
    )
    parser = make_parser()
    namespace = parser.parse(["--config", str(file), "--max-num-seqs=8", "--prompt", "three"])
    args = engine_args_from(namespace)
    assert args == EngineArgs(
        model="m", max_model_len=16384, max_num_seqs=8, enable_prefix_caching=False, hf_overrides={"x": 1},
        served_model_name=("a", "b"),
    )  # fmt: skip
    assert namespace.verbose
    assert namespace.prompt == ["one", "two", "three"]
    assert len(parser.notes) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_modell_len: 3", "unknown setting 'max_modell_len'. Did you mean --max-model-len?"),
        ("- a\n- b", "table of settings"),
        ("a: [", "not valid YAML"),
        ("enable_prefix_caching: 3", "must be true or false"),
        ("port: 80", "octavo serve"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    assert said in refusal("--config", str(file))


def test_an_absent_config_file_is_refused() -> None:
    assert "cannot read" in refusal("--config", "/nowhere/at/all.yaml")


def test_help_can_be_searched(capsys: pytest.CaptureFixture[str]) -> None:
    for word, shown, hidden in (("max-num", "--max-num-seqs", "--dtype"), ("listgroup", "Scheduling", "--dtype")):
        with pytest.raises(SystemExit) as caught:
            make_parser().parse([f"--help={word}"])
        text = capsys.readouterr().out
        assert caught.value.code == 0
        assert shown in text
        assert hidden not in text


def test_keywords_of_python_callers() -> None:
    warnings: list[str] = []
    args = engine_args_from_keywords(
        {"model": "m", "swap_space": 4, "cpu_offload_gb": 0, "tokenizer_mode": "auto", "enable_lora": False},
        warnings.append,
    )
    assert args == EngineArgs(model="m")
    assert len(warnings) == 1
    with pytest.raises(ConfigError, match="Did you mean max_model_len"):
        engine_args_from_keywords({"max_model_length": 3}, warnings.append)
    with pytest.raises(ConfigError, match="not supported"):
        engine_args_from_keywords({"enable_lora": True}, warnings.append)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)
NAMES = st.from_regex(r"[A-Za-z0-9_./:]{1,12}", fullmatch=True)
JSON = st.dictionaries(TEXTS, st.integers() | st.booleans() | TEXTS | st.none() | st.lists(st.integers()), max_size=3)


def _values(name: str) -> st.SearchStrategy[Any]:
    """Possible values of a setting."""
    each = settings_of(EngineArgs)[name]
    low, high = int(each.low or 0), each.high
    special: dict[str, st.SearchStrategy[Any]] = {
        "tensor_parallel_size": st.just(1),
        "block_size": st.integers(1, 16).map(lambda n: 16 * n),
        "max_model_len": st.just("auto") | st.integers(1, 2**31 - 1),
        "gpu_memory_utilization": st.floats(0, 1, exclude_min=True),
        "chat_template": TEXTS.map(lambda text: "{" + text),
    }
    by_kind: dict[str, st.SearchStrategy[Any]] = {
        "count": st.integers(low, int(high) if high is not None else 2**62),
        "switch": st.booleans(),
        "names": st.lists(NAMES, min_size=1, max_size=3).map(tuple),
        "table": JSON,
        "text": st.sampled_from(each.choices) if each.choices else NAMES,
    }
    return special[name] if name in special else by_kind[each.kind]


ARGS = st.fixed_dictionaries({}, optional={name: _values(name) for name in settings_of(EngineArgs)})
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(ARGS)
def test_args_to_flags_and_back_is_the_same(values: dict[str, Any]) -> None:
    args = EngineArgs(**values)
    assert engine_args_from(PARSER.parse(to_argv(args))) == args


WORDS = st.one_of(
    st.sampled_from(sorted(PARSER.flags())),
    st.sampled_from(sorted(KNOWN_FLAGS)).map(lambda name: f"--{name}"),
    st.sampled_from(["--", "-", "=", "--=", "-O3", "--help=x", "1K", "-1", "auto", "{}", "--max_model_len=9"]),
    st.text(max_size=12),
    st.tuples(st.sampled_from(sorted(PARSER.flags())), st.text(max_size=8)).map("=".join),
)


@QUICK
@given(st.lists(WORDS, max_size=6).filter(lambda words: "--config" not in " ".join(words)))
def test_nothing_typed_ends_in_a_traceback(words: list[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            engine_args_from(PARSER.parse(words))
        except SystemExit as end:
            assert end.code in (0, 2)
        except ConfigError as error:
            assert error.message


@QUICK
@given(content=st.text(max_size=80) | st.dictionaries(TEXTS, JSON).map(str))
def test_no_config_file_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_text(content, encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ConfigError):
        try:
            engine_args_from(PARSER.parse(["--config", str(file)]))
        except SystemExit as end:
            assert end.code == 2

"""octavo generate: what goes to stdout and to stderr, and with which exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.generate import main
from octavo.errors import OctavoError

from .fakes import Maker


def test_one_prompt_is_answered_on_stdout_and_described_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    assert main(["m", "--prompt", "Who are you?"], make) == 0
    out, err = capsys.readouterr()
    assert out == "hello there\n"
    assert make.session.args.model == "m"
    assert make.session.decode(make.session.prompts[0]) == "<user> Who are you?"
    assert "attention FAKE" in err
    assert "2,048 tokens" in err
    assert "ready in" in err
    # 4 prompt tokens, first token after 0.5 s, second 0.25 s later: the numbers of the fake.
    assert "4 prompt tokens (3 cached) · first token 500 ms · 2 tokens in 750 ms · 4.0 tokens/s" in err
    assert "asked as chat" in err
    assert make.session.is_closed


def test_raw_continues_the_text_itself(capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    assert main(["--raw", "--prompt", "Once upon"], make) == 0
    assert make.session.prompts == ["Once upon"]
    assert "asked as chat" not in capsys.readouterr().err


def test_a_model_without_template_gets_the_text_itself() -> None:
    make = Maker(has_chat_template=False)
    assert main(["--prompt", "Once upon"], make) == 0
    assert make.session.prompts == ["Once upon"]
    for flag in (["--chat"], ["--system", "x"]):
        with pytest.raises(OctavoError, match="no chat template"):
            main(["--prompt", "x", *flag], Maker(has_chat_template=False))


def test_several_prompts_are_labelled_blocks_in_their_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines, whole = tmp_path / "lines.txt", tmp_path / "whole.txt"
    lines.write_text("three\n\nfour\n")
    whole.write_text("two\nlines\n")
    make = Maker(lambda prompt: f"answer to {prompt}" + " long" * prompt.count("one"))
    assert main(["--raw", "-p", "one", "--prompt-file", str(whole), "--prompt-lines", str(lines)], make) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        "[1/4] one", "[2/4] two lines", "[3/4] three", "[4/4] four",
    ]  # fmt: skip
    assert "answer to one long\n" in out
    assert "4 prompts · " in err


def test_a_pipe_is_the_prompt(pipe: Callable[[str], None]) -> None:
    pipe("from a pipe\n")
    make = Maker()
    assert main(["--raw"], make) == 0
    assert make.session.prompts == ["from a pipe"]


def test_an_empty_pipe_is_told_from_an_empty_prompt(pipe: Callable[[str], None]) -> None:
    pipe("\n")
    with pytest.raises(OctavoError, match="no prompt: .* nothing came on standard input"):
        main([], Maker())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no prompt"),
        (["--prompt", "  "], "empty"),
        (["What is this?"], "--prompt"),
        (["--prompt-file", "/nowhere"], "cannot read"),
        (["-p", "x", "--raw", "--system", "y"], "--raw"),
        (["-p", "x", "--stop-token-ids", "a"], "stop_token_ids"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--n", "2", "--temperature", "0"], "greedily"),
    ],
)
def test_what_cannot_be_done_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(OctavoError, match=said):
        main(argv, Maker())


def test_sampling_flags_reach_the_request() -> None:
    make = Maker()
    argv = ["-p", "x", "--temperature", "0.7", "--top-k", "5", "--max_tokens", "1k", "--stop", "END", "--n", "2"]
    argv += ["--logit-bias", '{"7": -100}', "--stop-token-ids", "1", "2", "--ignore-eos", "--no-skip-special-tokens"]
    assert main(argv, make) == 0
    params = make.session.params[0]
    assert (params.temperature, params.top_k, params.max_tokens, params.n) == (0.7, 5, 1000, 2)
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (["END"], {7: -100}, [1, 2])
    assert (params.ignore_eos, params.skip_special_tokens) == (True, False)


def test_defaults_are_the_models_then_ours() -> None:
    make = Maker()
    main(["-p", "x"], make)
    assert (make.session.params[0].temperature, make.session.params[0].max_tokens) == (0.2, 512)
    make = Maker()
    main(["-p", "x", "--override-generation-config", '{"top_k": 9}'], make)
    assert (make.session.params[0].temperature, make.session.params[0].top_k) == (1.0, 9)


def test_json_has_an_object_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--json", "--raw", "-p", "a b", "-p", "c", "--quiet", "--n", "2", "--served-model-name", "s"], Maker())
        == 0
    )
    out, err = capsys.readouterr()
    records: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [record["prompt"] for record in records] == ["a b", "c"]
    assert records[0]["model"] == "s"
    assert [each["text"] for each in records[0]["outputs"]] == ["hello there"] * 2
    assert len(records[0]["outputs"][0]["token_ids"]) == 2
    assert records[0]["outputs"][0]["finish_reason"] == "stop"
    assert records[0]["usage"] == {"prompt_tokens": 2, "cached_tokens": 2, "completion_tokens": 4}
    assert records[0]["timings"]["time_to_first_token_s"] == pytest.approx(0.5)


def test_ctrl_c_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker(lambda _: "part of it ^C never seen")
    assert main(["-p", "x"], make) == 130
    out, err = capsys.readouterr()
    assert out == "part of it\n"
    assert "interrupted\n" in err
    assert make.session.is_closed


def test_ctrl_c_among_several_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker(lambda prompt: "done" if "one" in prompt else "part ^C")
    assert main(["-p", "one", "-p", "two", "-q"], make) == 130
    out = capsys.readouterr().out
    assert "[1/2] one\ndone\n" in out
    assert "[2/2] two (not finished)\npart\n" in out


def test_one_refused_prompt_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--raw", "-q", "-p", "x " * 50, "-p", "y"], Maker(max_model_len=20)) == 1
    out, err = capsys.readouterr()
    assert "[2/2] y\nhello there" in out
    assert err == "octavo generate: error: the prompt has 50 tokens, but the context holds 20\n"


def test_escape_sequences_of_a_model_do_not_reach_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker(lambda _: "red \x1b[31m\x07 text\n\tend")
    main(["-p", "x", "-q"], make)
    assert capsys.readouterr().out == "red \x1b[31m\x07 text\n\tend\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main(["-p", "x", "-q"], make)
    assert capsys.readouterr().out == "red \ufffd[31m\ufffd text\n\tend\n"

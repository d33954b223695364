"""octavo chat: turns, commands, Ctrl-C, and a context that fills up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octavo.cli.chat import main
from octavo.errors import ConfigError

from .fakes import Maker


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sit at the terminal and type; an exception is a key: KeyboardInterrupt is Ctrl-C. Ctrl-D at the end."""

    def typing(*lines: str | type[BaseException]) -> None:
        waiting: Iterator[str | type[BaseException]] = iter(lines)

        def fake_input(_prompt: str = "") -> str:
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", fake_input)

    return typing


def test_a_conversation_grows(type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    type_lines("Hi", "", "Again")
    assert main(["--system", "Be brief"], make) == 0
    assert [make.session.decode(prompt) for prompt in make.session.prompts] == [
        "<system> Be brief <user> Hi",
        "<system> Be brief <user> Hi <assistant> hello there <user> Again",
    ]
    out, err = capsys.readouterr()
    assert out.startswith("hello there\nhello there\n")
    assert "(3 cached)" in err
    assert make.session.is_closed


def test_commands(type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make = Maker()
    file = tmp_path / "talk.json"
    type_lines("/help", "one", f"/save {file}", "/reset", "two", "/system Be kind", "/system", "three", "/sav",
               f"/save {tmp_path}", "/exit", "never")  # fmt: skip
    assert main(["-q"], make) == 0
    assert [make.session.decode(prompt) for prompt in make.session.prompts] == [
        "<user> one", "<user> two", "<system> Be kind <user> three",
    ]  # fmt: skip
    assert json.loads(file.read_text()) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hello there"},
    ]
    err = capsys.readouterr().err
    assert "/reset" in err
    assert "Be kind" in err
    assert "unknown command /sav. Did you mean /save?" in err
    assert "cannot write" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make = Maker(lambda prompt: "half ^C an answer" if prompt.endswith("first") else "whole answer")
    type_lines("first", KeyboardInterrupt, "second")
    assert main([], make) == 0
    out, err = capsys.readouterr()
    assert "half\n" in out
    assert "whole answer\n" in out
    assert "stopped" in err
    assert make.session.decode(make.session.prompts[1]) == "<user> first <assistant> half <user> second"


def test_a_full_context_forgets_the_oldest_turns(
    type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make = Maker(lambda _: "w " * 20, max_model_len=120)
    type_lines("a", "b", "c", "d")
    assert main(["--system", "S"], make) == 0
    last = make.session.decode(make.session.prompts[-1])
    assert last.startswith("<system> S <user> ")
    assert "<user> a" not in last
    assert last.endswith("<user> d")
    assert len(make.session.prompts[-1]) + 60 <= 120
    assert "context full: forgot the oldest 2 messages" in capsys.readouterr().err


def test_a_message_that_never_fits_is_refused_and_forgotten(
    type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make = Maker(max_model_len=120)
    type_lines("x " * 200, "short")
    assert main([], make) == 0
    assert "too long: 201 tokens" in capsys.readouterr().err
    assert [make.session.decode(prompt) for prompt in make.session.prompts] == ["<user> short"]


def test_a_pipe_gives_a_message_per_line(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    pipe("one\ntwo\n")
    make = Maker()
    assert main(["-q"], make) == 0
    assert capsys.readouterr().out == "hello there\nhello there\n"
    assert len(make.session.prompts) == 2


def test_a_line_that_ends_in_a_backslash_goes_on(type_lines: Callable[..., None]) -> None:
    make = Maker()
    type_lines("one\\", "two")
    main([], make)
    assert make.session.decode(make.session.prompts[0]) == "<user> one two"


def test_a_model_without_chat_template_is_refused() -> None:
    make = Maker(has_chat_template=False)
    with pytest.raises(ConfigError, match="no chat template"):
        main([], make)
    assert make.session.is_closed

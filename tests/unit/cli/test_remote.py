"""octavo chat --url and octavo complete, against a server over a real socket."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator

import pytest

from octavo.cli.chat import main as chat
from octavo.cli.openai_client import OpenAIClient, ServerError
from octavo.cli.remote import complete
from octavo.errors import ConfigError

from .fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer("well\x1b[2J yes") as running:
        yield running


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_question(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--url", server.url, "--system-prompt", "Be brief", "-q", "Hi", "--temperature", "0.5", "--stop", "END"]
    assert chat(flags) == 0
    out, err = capsys.readouterr()
    assert out == "well\x1b[2J yes\n"  # a pipe gets the text as it is
    assert "fake at http://" in err and "3 prompt tokens (1 cached)" in err and "2 tokens in" in err
    (asked,) = server.requests
    assert asked == {
        "model": "fake", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "stop": ["END"],
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
    }  # fmt: skip


def test_a_conversation_grows(
    server: FakeServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("one\nrefuse this\ntwo\n")
    assert chat([f"--url={server.url}", "--model-name", "other", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.count("yes\n") == 2
    assert err == "error: the server answers 400: no, thank you\n"
    assert [each["content"] for each in server.requests[-1]["messages"]] == ["one", "well\x1b[2J yes", "two"]
    assert server.requests[-1]["model"] == "other"


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(
    server: FakeServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    server.words = ["this", "is", "too", "long"]  # the answer is what makes the second request too long
    pipe("a\nb\nthis is too long alone\n")
    assert chat(["--url", server.url]) == 1
    err = capsys.readouterr().err
    assert "context full: forgot the oldest 2 messages" in err
    assert "does not fit" in err, "a message that never fits is refused"
    assert [len(each["messages"]) for each in server.requests] == [1, 3, 1, 3, 1]


def test_completions(server: FakeServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    pipe("Once upon\n\nbreak here\n")
    server.words = ["a", "time", "there"]
    assert complete(["--url", server.url, "--max-tokens", "7"]) == 1
    out, err = capsys.readouterr()
    assert out == "a time there\na time\n"
    assert "error: the server's answer broke off" in err
    assert server.requests[0]["prompt"] == "Once upon" and server.requests[0]["max_tokens"] == 7
    assert complete(["--url", server.url, "-q", "Once", "--quiet"]) == 0
    assert capsys.readouterr() == ("a time there\n", "")


def test_keys(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    complete(["--url", server.url, "-q", "x"])
    assert {each["authorization"] for each in server.headers} == {"Bearer from-environment"}
    complete(["--url", server.url, "-q", "x", "--api-key", "mine"])
    assert server.headers[-1]["authorization"] == "Bearer mine"


def test_what_cannot_be_reached_or_understood(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1"):
        with pytest.raises(ConfigError, match="must be like"):
            OpenAIClient(url)
    with pytest.raises(ServerError, match="cannot reach http://127.0.0.1:1/v1"):
        complete(["--url", "http://127.0.0.1:1/v1", "-q", "x"])
    for prompt in ("garbage", "mute"):
        assert complete(["--url", server.url, "-q", prompt]) == 1
    err = capsys.readouterr().err
    assert "broke off before its end" in err and "cannot reach" in err


def test_the_path_of_the_api_may_be_left_out(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete(["--url", server.url.removesuffix("/v1"), "-q", "hello"]) == 0
    assert f"at {server.url}\n" in capsys.readouterr().err


def test_leaving_an_answer_aborts_it() -> None:
    """Red when the client reads on, or leaves the connection open, after the user has had enough."""
    with FakeServer(delay_s=0.001) as server:
        stream = OpenAIClient(server.url).stream("/completions", {"prompt": "x", "max_tokens": 10**5, "ignore_eos": 1})
        next(stream)
        stream.close()
        for _ in range(200):
            if server.num_open == 0:
                break
            time.sleep(0.05)
        assert server.num_open == 0

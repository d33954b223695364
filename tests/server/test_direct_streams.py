"""Streams that are written straight to their connections: framing, keep-alive, old clients, slow ones, and that they
say what a stream through ASGI says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from octavo.outputs import CompletionOutput, RequestOutput
from octavo.server.app import build_app
from octavo.server.connection_writer import extension_of
from octavo.server.deadline import Deadline
from octavo.server.sse import EventStream, StallGuard
from tests.server.conftest import Server
from tests.waiting import wait_until

BODY = {"model": "tiny", "prompt": "The sea", "max_tokens": 12, "ignore_eos": True, "temperature": 0, "stream": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "ignore_eos": True,
        "temperature": 0, "stream": True}  # fmt: skip


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as found:
        yield found


def request_bytes(body: dict[str, Any], version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def read_chunked(connection: socket.socket, data: bytes = b"") -> tuple[bytes, bytes, bytes]:
    """Head, body and what came behind it. Fails on framing that is not exact."""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, data = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    body = b""
    while True:
        while b"\r\n" not in data:
            data += connection.recv(65536)
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        while len(data) < size + 2:
            data += connection.recv(65536)
        assert data[size : size + 2] == b"\r\n"
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return head, body, data


def events_of(body: bytes | str) -> list[dict[str, Any]]:
    text = body if isinstance(body, str) else body.decode()
    lines = text.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_connection_lives_on_after_a_stream(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(request_bytes(BODY))
        head, body, rest = read_chunked(connection)
        assert b"connection: close" not in head and rest == b""
        events = events_of(body)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert sum("created" in each for each in events) == len(events) <= 13


def test_streams_that_wait_on_one_connection_are_answered_in_order(connection: socket.socket) -> None:
    """The second is asked before the first is answered, so that uvicorn knows two requests at once."""
    connection.sendall(request_bytes({**BODY, "prompt": "One"}) + request_bytes({**BODY, "n": 2, "temperature": 1}))
    _, first, rest = read_chunked(connection)
    _, second, _ = read_chunked(connection, rest)
    assert {choice["index"] for event in events_of(first) for choice in event["choices"]} == {0}
    assert {choice["index"] for event in events_of(second) for choice in event["choices"]} == {0, 1}


def test_a_client_of_http_1_0_gets_plain_bytes_and_the_end(connection: socket.socket) -> None:
    """It knows no chunks. Red when their sizes stand between the events."""
    connection.sendall(request_bytes(BODY, "1.0"))
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"connection: close" in head
    assert events_of(body)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_client_that_reads_late_gets_everything_in_fewer_pieces(server: Server) -> None:
    """What does not fit into the connection waits at the engine's side, joined, and follows when there is room."""
    host, port = server.url.removeprefix("http://").split(":")
    # More than the connection holds, less than may wait behind it.
    body = {**BODY, "n": 8, "temperature": 1, "max_tokens": 240, "return_token_ids": True, "logprobs": 1}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        connection.sendall(request_bytes(body))
        data = connection.recv(1000)
        engine: Any = server.service.engine
        wait_until(lambda: engine._frontend.client.call("snapshot").num_running == 0, "the engine's end")
        _, text, _ = read_chunked(connection, data)
    choices = [choice for event in events_of(text) for choice in event["choices"]]
    assert sum(len(choice["token_ids"]) for choice in choices) == 8 * 240
    assert len(choices) < 8 * 240
    assert [choice["finish_reason"] for choice in choices].count("length") == 8


def said(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything of a stream but ids, times, and how it was cut into events."""
    texts: dict[int, str] = {}
    reasons: dict[int, Any] = {}
    for event in events:
        for choice in event["choices"]:
            delta = choice.get("delta") or {}
            index = choice["index"]
            texts[index] = texts.get(index, "") + (choice.get("text") or delta.get("content") or "")
            reasons[index] = choice["finish_reason"] or reasons.get(index)
    usage = events[-1]["usage"]
    usage.pop("prompt_tokens_details")  # what is cached depends on who asked before
    return {"texts": texts, "reasons": reasons, "usage": usage, "metrics": sorted(events[-1]["metrics"])}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 2, "seed": 3, "temperature": 1, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {**BODY, "prompt": ["The sea", "A hill", "Rain"], "echo": True, "logprobs": 1}),
        ("/v1/completions", {**BODY, "stop": ["e", "a"], "max_tokens": 60}),
    ],
    ids=["two answers", "three prompts", "stop strings"],
)
def test_a_stream_says_the_same_through_asgi(server: Server, path: str, body: dict[str, Any]) -> None:
    """Other ASGI servers know no direct way: both are the same events."""
    body = {**body, "stream_options": {"include_usage": True}}

    async def ask(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        async with client:
            answer = await client.post(path, json=body, timeout=60)
        assert answer.status_code == 200
        return events_of(answer.text)

    async def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        through_asgi = httpx.AsyncClient(transport=httpx.ASGITransport(build_app(server.service)), base_url="http://x")
        return await ask(httpx.AsyncClient(base_url=server.url)), await ask(through_asgi)

    direct, through_asgi = asyncio.run(both())
    assert said(direct) == said(through_asgi)


class Story:
    """A generation, its events and its connection, in one: what a stream touches."""

    def __init__(self) -> None:
        self.cycle: Any = self
        self.transport: Any = self
        self.flow: Any = self
        self.writer: Any = None
        self.disconnected = self.write_paused = self.is_aborted = False
        self.chunked_encoding: bool | None = None
        self.expected_content_length = 0
        self.scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "extensions": extension_of(self)}
        self.written: list[bytes] = []
        self.sent: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.errors: list[BaseException | None] = []
        self.num_open, self.pending_bytes = 1, 0
        self.sink: Any = None

    # ------------------------------------------------------------------------------------------ the connection

    def resume_reading(self) -> None: ...

    def bound_buffers(self) -> None: ...

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        self.is_aborted = True

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    # ------------------------------------------------------------------------------------------ the generation

    def deadline(self) -> Deadline:
        return Deadline(None)

    async def start(self) -> None: ...

    async def next(self) -> list[RequestOutput]:
        return [output("first")]

    def attach(self, sink: Any, *, is_paused: bool) -> None:
        self.sink = sink
        self.log.append(f"attach {is_paused}")

    def note(self, _outputs: Sequence[RequestOutput]) -> bool:
        return not self.num_open

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def close(self, error: BaseException | None = None) -> None:
        self.errors.append(error)

    # ---------------------------------------------------------------------------------------------- the events

    def of(self, outputs: Sequence[RequestOutput]) -> bytes:
        text = outputs[0].outputs[0].text
        if text == "bad":
            raise ValueError("cannot be shown")
        return text.encode()

    def ending(self) -> bytes:
        return b"usage"

    # ----------------------------------------------------------------------------------------------- running it

    async def begin(self, guard: StallGuard | None = None) -> asyncio.Task[None]:
        parts: Any = self
        stream = EventStream(parts, parts, guard or StallGuard(60))
        task = asyncio.create_task(stream(self.scope, parts.never, parts.send))
        while self.sink is None:
            await asyncio.sleep(0)
        return task

    async def never(self) -> Any:
        raise AssertionError("the connection tells when the client goes")

    def tell(self, text: str, *, finished: bool = False) -> None:
        self.num_open = 0 if finished else 1
        self.sink.outputs_came([output(text, finished=finished)])


def output(text: str, *, finished: bool = False) -> RequestOutput:
    return RequestOutput("a", None, [1], None, [CompletionOutput(0, text, [1])], finished)


def test_tokens_are_written_by_the_call_that_brings_them() -> None:
    async def work() -> None:
        story = Story()
        task = await story.begin()
        story.tell("second")
        assert story.written == [b"5\r\nfirst\r\n", b"6\r\nsecond\r\n"]  # before any task has run
        story.tell("", finished=False)
        story.tell("last", finished=True)
        await task
        assert len(story.written) == 2
        assert [each["type"] for each in story.sent] == ["http.response.start", "http.response.body"]
        assert story.sent[-1]["body"] == b"lastusagedata: [DONE]\n\n" and not story.sent[-1]["more_body"]
        assert story.writer is None and story.errors == [None]

    asyncio.run(work())


def test_a_slow_client_pauses_its_stream_and_is_cut_off() -> None:
    async def work() -> None:
        story = Story()
        task = await story.begin(StallGuard(0.05))
        story.writer.pause_writing()
        story.writer.resume_writing()
        await asyncio.sleep(0.1)
        assert not task.done()  # it takes what there is: no reason to cut it off
        story.writer.pause_writing()
        await task
        assert story.log == ["attach False", "pause", "resume", "pause"]
        assert story.is_aborted and isinstance(story.errors[0], asyncio.CancelledError)

    asyncio.run(work())


def test_a_client_that_goes_ends_its_stream_at_once() -> None:
    async def work() -> None:
        story = Story()
        task = await story.begin()
        story.writer.connection_lost()
        await task
        story.tell("late")
        assert story.written == [b"5\r\nfirst\r\n"]
        assert isinstance(story.errors[0], asyncio.CancelledError)

    asyncio.run(work())


def test_what_fails_in_between_is_told_as_an_event(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        story = Story()
        task = await story.begin()
        story.tell("bad")
        story.tell("after")
        await task
        assert b"internal" in story.sent[-1]["body"] and story.sent[-1]["body"].endswith(b"data: [DONE]\n\n")
        assert isinstance(story.errors[0], ValueError) and len(story.written) == 1

    asyncio.run(work())
    assert "a stream failed" in caplog.text

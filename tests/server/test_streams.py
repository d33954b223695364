"""Streams and their readers: who goes away, who is too slow, what takes too long, what is ended by id."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.server.deadline import Deadline
from octavo.server.generation import Generation
from octavo.server.service import RequestRecord, Service
from octavo.server.sse import EventStream, StallGuard
from tests.server.conftest import Server
from tests.waiting import join, wait_until

LONG = {"model": "tiny", "prompt": "The sea", "max_tokens": 250, "ignore_eos": True, "temperature": 0}


class Records:
    """Hears of finished requests."""

    def __init__(self) -> None:
        self.found: list[RequestRecord] = []

    def request_finished(self, record: RequestRecord) -> None:
        self.found.append(record)

    def install(self, service: Service) -> None:
        service.observers.append(self)

    def wait(self, count: int = 1) -> RequestRecord:
        wait_until(lambda: len(self.found) >= count, f"{count} finished requests")
        return self.found[count - 1]


def num_blocks_held(server: Server) -> float:
    engine: Any = server.service.engine
    snapshot = engine._frontend.client.call("snapshot")
    return snapshot.num_blocks - 1 - snapshot.num_free_blocks


def test_a_reader_that_leaves_ends_its_request(
    start_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """Streaming or not, whatever it was doing: the engine stops and every block is free again."""
    records = Records()
    server = start_server(records.install)
    engine_ids = server.service.open_requests.engine_ids
    host, port = server.url.removeprefix("http://").split(":")
    for index, streaming in enumerate((True, False)):
        raw = json.dumps({**LONG, "n": 4, "temperature": 1, "stream": streaming}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            if streaming:
                assert b"200 OK" in connection.recv(1000)
            else:
                wait_until(lambda: any(map(engine_ids, open_ids(server))), "a request at the engine")
        record = records.wait(index + 1)
        assert record.error_code == "client_gone"
        assert "abort" in record.finish_reasons
        assert record.num_generation_tokens < 1000
    wait_until(lambda: not num_blocks_held(server), "free blocks")
    assert not open_ids(server)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


def open_ids(server: Server) -> list[str]:
    return list(server.service.open_requests._engine_ids)


class Endless:
    """A generation that goes on, and its events."""

    def __init__(self, pending_bytes: int = 0) -> None:
        self.pending_bytes = pending_bytes
        self.num_open = 1
        self.errors: list[BaseException | None] = []

    async def next(self) -> list[Any]:
        return [None]

    async def start(self) -> None: ...

    def of(self, _outputs: Any) -> bytes:
        return b"data: x\n\n"

    def deadline(self) -> Deadline:
        return Deadline(None)

    def close(self, error: BaseException | None = None) -> None:
        self.errors.append(error)


@pytest.mark.parametrize(("timeout_s", "pending_bytes"), [(0.05, 0), (0.4, 2 << 20)], ids=["too long", "too much"])
def test_a_reader_that_takes_nothing_is_cut_off(timeout_s: float, pending_bytes: int) -> None:
    """Red when a stream goes on for somebody who does not read: what it is a stream of is closed, and it ends."""

    async def run() -> tuple[Endless, int]:
        endless, num_sent = Endless(pending_bytes), 0

        async def send(_message: Any) -> None:
            nonlocal num_sent
            num_sent += 1
            if num_sent == 4:
                await asyncio.Event().wait()  # the socket's buffer is full, for good

        async def receive() -> Any:
            await asyncio.Event().wait()

        parts: Any = endless
        await EventStream(parts, parts, StallGuard(timeout_s))({"type": "http"}, receive, send)
        return endless, num_sent

    endless, num_sent = asyncio.run(run())
    assert isinstance(endless.errors[0], asyncio.CancelledError)
    assert num_sent == 4


def test_a_slow_reader_gets_everything_in_fewer_pieces(server: Server) -> None:
    """What comes while a reader is busy waits for it as one piece, with all of its tokens and logprobs."""

    async def run() -> tuple[list[str], int, int]:
        engine: Any = server.service.engine
        outputs = engine.generate(
            [5, 6, 7], SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.DELTA)
        )
        texts, num_tokens, num_logprobs = [], 0, 0
        async for output in outputs:
            texts.append(output.outputs[0].text)
            num_tokens += len(output.outputs[0].token_ids)
            num_logprobs += len(output.outputs[0].logprobs or ())
            await asyncio.sleep(0.05)
        return texts, num_tokens, num_logprobs

    texts, num_tokens, num_logprobs = asyncio.run(run())
    assert (num_tokens, num_logprobs) == (60, 60)
    assert len(texts) < 60


def test_what_waits_for_a_reader_is_known(server: Server) -> None:
    async def run() -> list[int]:
        generation = Generation(
            service=server.service, route="/", model="tiny", request_id="behind", tenant="t", prompts=[[5, 6, 7]],
            params=SamplingParams(max_tokens=40, ignore_eos=True, output_kind=RequestOutputKind.DELTA),
        )  # fmt: skip
        seen: list[int] = []
        await generation.start()
        while generation.num_open:
            (output,) = await generation.next()
            if not seen:
                while output.metrics is not None and output.metrics.num_generation_tokens < 20:
                    await asyncio.sleep(0.005)
            seen.append(generation.pending_bytes)
        generation.close()
        return seen

    seen = asyncio.run(run())
    assert seen[0] >= 10 * 64
    assert seen[-1] == 0


def test_abort_by_id(server: Server) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.client() as client:
            answers.append(client.post("/v1/completions", json=LONG, headers={"X-Request-Id": "mine"}))

    with server.client() as client:

        def abort_while_it_runs() -> bool:
            thread = threading.Thread(target=ask)
            thread.start()
            is_aborted = False
            while thread.is_alive() and not is_aborted:  # on a slow day it may be over before it was seen to run
                is_aborted = client.post("/v1/requests/cmpl-mine/abort").status_code == 200
            join(thread)
            return is_aborted

        wait_until(abort_while_it_runs, "an abort in time")
        choice = answers[-1].json()["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert answers[-1].json()["usage"]["completion_tokens"] < 250
        gone = client.post("/v1/requests/cmpl-mine/abort")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "request_not_found")
        assert client.post("/abort_requests", json={"request_ids": ["nobody"]}).json() == {"aborted": []}


def test_an_abort_counts_that_comes_before_the_engine_has_the_request(
    server: Server, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = server.service.need_engine
    open_stream = engine.open_stream

    async def late(*args: Any, **options: Any) -> Any:
        assert (await asyncio.to_thread(client.post, "/v1/requests/early/abort")).status_code == 200
        return await open_stream(*args, **options)

    monkeypatch.setattr(engine, "open_stream", late)
    for more in ({}, {"n": 2, "temperature": 1}, {"n": 2, "use_beam_search": True}):
        answer = client.post("/v1/completions", json={**LONG, **more}, headers={"X-Request-Id": "early"}).json()
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"abort"}, more


def test_a_deadline_has_an_error_of_its_own(client: httpx.Client) -> None:
    late = client.post("/v1/completions", json={**LONG, "timeout_ms": 1})
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
    assert late.headers["x-should-retry"] == "false"  # OpenAI's clients would ask twice more
    with client.stream("POST", "/v1/completions", json={**LONG, "timeout_ms": 1, "stream": True}) as response:
        assert "request_timeout" in response.read().decode()
    in_time = client.post("/v1/completions", json={**LONG, "max_tokens": 1, "timeout_ms": 600_000})
    assert in_time.status_code == 200


def test_waiting_too_long_has_an_error_of_its_own(server: Server) -> None:
    """Eight sequences fit; while they run, one more waits, and not for longer than it said."""
    with server.client() as client:
        busy = {**LONG, "n": 8, "temperature": 1, "stream": True}
        with client.stream("POST", "/v1/completions", json=busy) as response:
            lines = response.iter_lines()
            next(lines)
            with server.client() as other:
                late = other.post("/v1/completions", json={**LONG, "max_queue_ms": 1})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
            assert int(late.headers["retry-after"]) >= 1
            assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_records_say_what_was_done(start_server: Callable[..., Server]) -> None:
    records = Records()
    server = start_server(records.install)
    with server.client() as client:
        client.post("/v1/completions", json={**LONG, "max_tokens": 3, "prompt": [[5, 6], [7]]})
        client.post("/v1/completions", json={**LONG, "prompt": [60000]})
    good, bad = records.wait(1), records.wait(2)
    assert (good.route, good.num_prompt_tokens, good.num_generation_tokens) == ("/v1/completions", 3, 6)
    assert good.finish_reasons == ("length", "length")
    assert good.error_code is None
    assert good.stats is not None
    assert bad.error_code == "invalid_value"

"""Streams between a thread that makes outputs and a reader: what is joined, who is told when, what a pause keeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from octavo.engine.output_stream import Mailroom, OutputStream
from octavo.errors import EngineDeadError
from octavo.outputs import CompletionOutput, RequestOutput


def output(token_id: int, request_id: str = "a", *, finished: bool = False) -> RequestOutput:
    answer = CompletionOutput(0, f" {token_id}", [token_id], finish_reason="length" if finished else None)
    return RequestOutput(request_id, None, [1], None, [answer], finished)


def ids_of(outputs: Sequence[RequestOutput]) -> list[tuple[str, list[int]]]:
    return [(each.request_id, each.outputs[0].token_ids) for each in outputs]


class Reader:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, list[int]]]] = []
        self.errors: list[BaseException] = []

    def outputs_came(self, outputs: Sequence[RequestOutput]) -> None:
        self.calls.append(ids_of(outputs))

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)


class Setting:
    """A stream of two requests and its mailroom."""

    def __init__(self) -> None:
        self.room = Mailroom(asyncio.get_running_loop())
        self.closed: list[Any] = []
        self.stream = OutputStream[RequestOutput](["a", "b"], self.room, self.closed.append, is_delta=True)
        self.reader = Reader()

    def post(self, *items: Any) -> None:
        self.room.post([(self.stream, item) for item in items])

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


def run(work: Callable[[Setting], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await work(Setting())

    asyncio.run(main())


def test_a_loop_that_is_behind_tells_its_reader_once() -> None:
    """Red when each of several messages costs a write of its own, or when one is told late for want of others."""

    async def work(setting: Setting) -> None:
        setting.stream.attach(setting.reader, is_paused=False)
        setting.post(output(1))
        await setting.settle()
        assert setting.reader.calls == [[("a", [1])]]
        for token_id in (2, 3):
            setting.post(output(token_id), output(token_id, "b"))
        await setting.settle()
        assert setting.reader.calls[1:] == [[("a", [2, 3]), ("b", [2, 3])]]

    run(work)


def test_a_pause_joins_and_loses_nothing() -> None:
    async def work(setting: Setting) -> None:
        setting.post(output(1))
        await setting.settle()
        setting.stream.attach(setting.reader, is_paused=True)
        for token_id in (2, 3):
            setting.post(output(token_id))
            await setting.settle()
        assert setting.reader.calls == []
        assert ids_of(setting.stream.waiting) == [("a", [1, 2, 3])]
        setting.stream.resume()
        setting.stream.pause()
        setting.post(output(4, finished=True), output(5, "b", finished=True))
        await setting.settle()
        assert setting.stream.num_open == 2  # finished, and not taken
        setting.stream.resume()
        assert setting.reader.calls == [[("a", [1, 2, 3])], [("a", [4]), ("b", [5])]]
        assert setting.stream.num_open == 0
        setting.stream.close()
        assert setting.closed == []

    run(work)


def test_an_error_comes_after_what_came_before_it() -> None:
    async def work(setting: Setting) -> None:
        error = EngineDeadError("gone")
        setting.post(output(1), error)
        assert ids_of(await setting.stream.get()) == [("a", [1])]
        with pytest.raises(EngineDeadError, match="gone"):
            await setting.stream.get()
        setting.post(output(2), error)
        await setting.settle()
        setting.stream.attach(setting.reader, is_paused=False)
        setting.stream.resume()
        assert (setting.reader.calls, setting.reader.errors) == ([[("a", [2])]], [error])

    run(work)


def test_a_reader_that_gives_up_waiting_misses_nothing() -> None:
    async def work(setting: Setting) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await setting.stream.get()
        setting.post(output(1))
        assert ids_of(await setting.stream.get()) == [("a", [1])]
        setting.stream.close()
        setting.stream.close()
        assert setting.closed == [setting.stream]  # "b" is still to be aborted, once

    run(work)


def test_who_makes_outputs_can_wait_until_readers_have_been_told() -> None:
    """Red when the wait ends early, or not before its time is up although everybody was told."""

    async def work(setting: Setting) -> None:
        setting.stream.attach(setting.reader, is_paused=False)
        setting.room.wait_until_told(60.0)  # there is nothing to tell
        setting.post(output(1))
        waited: list[int] = []

        def wait() -> None:
            setting.room.wait_until_told(60.0)
            waited.append(len(setting.reader.calls))

        thread = threading.Thread(target=wait)
        thread.start()  # before the loop's next turn
        while thread.is_alive():
            await asyncio.sleep(0.001)
        assert waited == [1]
        setting.post(output(2))
        setting.room.wait_until_told(0.01)  # in the loop's own thread: nobody can be told meanwhile
        assert len(setting.reader.calls) == 1
        await setting.settle()
        assert len(setting.reader.calls) == 2

    run(work)

"""AsyncLLM over a counting engine, in a thread and in a process: streams, aborts, slow readers, ends."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.frontend import Frontend, start_frontend
from octavo.errors import ContextLengthError, EngineDeadError, InvalidRequestError
from octavo.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineSnapshot
from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from tests.unit.engine.fakes import CRASH, READY, REFUSE, FakeArgs

ROOT = Path(__file__).resolve().parents[3]
RunWith = Callable[[Callable[[AsyncLLM], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=[True, False], ids=["thread", "process"])
def run_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RunWith:
    """Run a coroutine with an engine that takes two milliseconds per step."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(work: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            args: Any = FakeArgs(step_s=0.002)
            async with AsyncLLM(start_frontend(args, request.param, build="tests.unit.engine.fakes:build")) as engine:
                await work(engine)

        asyncio.run(main())

    return run


def params(max_tokens: int = 4, kind: RequestOutputKind = RequestOutputKind.DELTA, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, output_kind=kind, detokenize=False, n=n)


async def collect(engine: AsyncLLM, prompt: list[int], **more: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params(**more))]


async def num_running(engine: AsyncLLM) -> int:
    snapshot = await asyncio.to_thread(engine._frontend.client.call, "snapshot")
    assert isinstance(snapshot, EngineSnapshot)
    return snapshot.num_running


def test_many_streams_at_once(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        streams = await asyncio.gather(*(collect(engine, [1, 2, index], max_tokens=9) for index in range(40)))
        for outputs in streams:
            token_ids = [token_id for output in outputs for token_id in output.outputs[0].token_ids]
            assert token_ids == list(range(8, -1, -1))
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    run_with(work)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_slow_reader_gets_everything_in_fewer_pieces(run_with: RunWith, kind: RequestOutputKind) -> None:
    # Red when outputs pile up for a reader who does not come, or when what it missed is lost.
    async def work(engine: AsyncLLM) -> None:
        pieces: list[list[int]] = []
        async for output in engine.generate([1], params(50, kind)):
            pieces.append(output.outputs[0].token_ids)
            await asyncio.sleep(0.1)
        whole = list(range(49, -1, -1))
        assert len(pieces) < 25
        if kind is RequestOutputKind.DELTA:
            assert [token_id for piece in pieces for token_id in piece] == whole
        else:
            assert pieces[-1] == whole
        if kind is RequestOutputKind.FINAL_ONLY:
            assert len(pieces) == 1

    run_with(work)


@pytest.mark.parametrize("way", ["leave the loop", "cancel the task"])
def test_who_stops_reading_aborts(run_with: RunWith, way: str) -> None:
    async def read_some(engine: AsyncLLM) -> None:
        stream = engine.generate([1], params(10**5))
        async for _ in stream:
            if way == "leave the loop":
                break
        await stream.aclose()

    async def work(engine: AsyncLLM) -> None:
        task = asyncio.create_task(read_some(engine))
        if way == "cancel the task":
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await task if way == "leave the loop" else None
        # The abort travels before this call, which is answered between two steps: one step later it is gone.
        assert await num_running(engine) == 0

    run_with(work)


def test_abort_by_id_ends_the_stream_for_its_reader(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        outputs: list[RequestOutput] = []
        async for output in engine.generate([1], params(10**5, n=2), "mine"):
            outputs.append(output)
            if len(outputs) == 1:
                await engine.abort(["mine", "nobody's"])
        assert {answer.finish_reason for answer in outputs[-1].outputs} == {"abort"}
        assert outputs[-1].finished
        assert await num_running(engine) == 0

    run_with(work)


def test_a_refused_request_raises_what_the_engine_raised(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        good = asyncio.create_task(collect(engine, [1], max_tokens=20))
        with pytest.raises(ContextLengthError, match="too long for this test"):
            await collect(engine, [REFUSE], n=2)
        with pytest.raises(InvalidRequestError, match="token id"):
            await collect(engine, [-1])
        assert (await good)[-1].finished

    run_with(work)


def test_an_id_in_use_is_refused_and_free_again_afterwards(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        first = engine.generate([1], params(10**5), "same")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="still running"):
            await anext(engine.generate([1], params(), "same"))
        assert (await anext(first)).outputs[0].token_ids
        await first.aclose()
        assert [output async for output in engine.generate([1], params(), "same")][-1].finished

    run_with(work)


def test_engine_death_reaches_every_reader_and_all_who_come_later(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        assert engine.is_running and not engine.errored
        readers = [asyncio.create_task(collect(engine, [1], max_tokens=10**5)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineDeadError, match="caught fire"):
            await collect(engine, [CRASH])
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and "caught fire" in str(result)
        assert engine.errored and not engine.is_running
        for later in (collect(engine, [1]), engine.check_health(), engine.reset_prefix_cache()):
            with pytest.raises(EngineDeadError, match="caught fire"):
                await later

    run_with(work)


def test_shutdown_tells_the_readers(run_with: RunWith) -> None:
    async def work(engine: AsyncLLM) -> None:
        await engine.check_health()
        reader = asyncio.create_task(collect(engine, [1], max_tokens=10**5))
        await asyncio.sleep(0.05)
        engine.shutdown()
        engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await reader
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine, [1])

    run_with(work)


class EndlessEngine:
    """An engine that has another token for every request whenever it is asked, after a moment."""

    ready = READY

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.num_steps = 0
        self.has_work = threading.Event()

    def submit(self, requests: list[EngineCoreRequest]) -> None:
        self.request_ids += [request.request_id for request in requests]
        self.has_work.set()

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> None:
        self.has_work.clear()

    def recv(self, timeout_s: float | None) -> EngineCoreOutputs | None:
        if not self.has_work.wait(timeout_s):
            return None
        time.sleep(0.0005)
        self.num_steps += 1
        return EngineCoreOutputs([EngineCoreOutput(each, [self.num_steps - 1]) for each in self.request_ids])

    def call(self, method: str, *args: Any) -> Any:
        raise AssertionError(method)

    def close(self) -> None: ...


def test_a_process_that_is_behind_rests_and_shows_several_tokens_at_once() -> None:
    """Red when it writes each token by itself although it has time for nothing else, or loses one as it joins them."""

    class Laborious:
        """A reader that needs ten milliseconds for whatever it is told."""

        def __init__(self) -> None:
            self.calls: list[tuple[float, float]] = []
            self.pieces: list[list[int]] = []
            self.has_enough = asyncio.Event()

        def outputs_came(self, outputs: Sequence[RequestOutput]) -> None:
            begun_s = time.monotonic()
            self.pieces.append(outputs[0].outputs[0].token_ids)
            time.sleep(0.01)
            self.calls.append((begun_s, time.monotonic()))
            if len(self.calls) == 20:
                self.has_enough.set()

        def failed(self, error: BaseException) -> None:
            raise AssertionError(error)

    async def main() -> None:
        async with AsyncLLM(Frontend(EndlessEngine(), None)) as engine:
            reader = Laborious()
            stream = await engine.open_stream([[1]], params(10**5), ["a"])
            stream.attach(reader, is_paused=False)
            await reader.has_enough.wait()
            stream.close()
        tokens = [token_id for piece in reader.pieces for token_id in piece]
        assert tokens == list(range(len(tokens)))
        # The median, for a machine that is busy with other things may be too late for a rest.
        assert statistics.median(map(len, reader.pieces)) > 1
        rests = [(next_s - told_s) / (told_s - begun_s) for (begun_s, told_s), (next_s, _) in pairwise(reader.calls)]
        assert statistics.median(rests) > 0.25

    asyncio.run(main())


def test_a_loop_that_was_closed_leaves_nothing_running() -> None:
    args: Any = FakeArgs(step_s=0.002)
    engine = AsyncLLM(start_frontend(args, True, build="tests.unit.engine.fakes:build"))

    async def abandon() -> None:
        stream = engine.generate([1], params(10**5))
        await anext(stream)
        stream_keeps_running.append(stream)

    stream_keeps_running: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon())
    loop.close()  # without shutdown_asyncgens: nobody closes the generator

    async def look() -> None:
        for _ in range(500):
            if await num_running(engine) == 0:
                break
            await asyncio.sleep(0.01)
        assert await num_running(engine) == 0
        assert (await collect(engine, [1]))[-1].finished

    asyncio.run(look())
    engine.shutdown()


def test_throughput_is_logged_while_working_and_only_where_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_LOG_STATS_INTERVAL", "0.3")
    caplog.set_level("INFO", "octavo")

    async def work(is_disabled: bool | None) -> None:
        args: Any = FakeArgs(step_s=0.002, disable_log_stats=is_disabled)
        async with AsyncLLM(start_frontend(args, True, build="tests.unit.engine.fakes:build")) as engine:
            await collect(engine, [1], max_tokens=400)

    asyncio.run(work(None))
    assert "throughput" not in caplog.text
    asyncio.run(work(False))
    assert "Engine 000: Avg prompt throughput: 0.0 tokens/s" in caplog.text


CARELESS = """
import asyncio, sys
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.frontend import start_frontend
from octavo.sampling_params import SamplingParams
from tests.unit.engine.fakes import FakeArgs
build = "tests.unit.engine.fakes:build"
engine = AsyncLLM(start_frontend(FakeArgs(step_s=0.002), sys.argv[1] == "thread", build=build))
async def main():
    async for _ in engine.generate([1], SamplingParams(max_tokens=10**6, detokenize=False)):
        break
asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_program_that_forgets_to_shut_down_ends_quietly(where: str) -> None:
    # Red when the engine keeps the program alive, or the end of the program crashes under its thread.
    done = subprocess.run([sys.executable, "-c", CARELESS, where], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

"""EngineSupervisor over counting engines in processes that are killed, stopped, and crash over what they are asked."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.engine.blame import RestartPolicy
from octavo.engine.supervisor import EngineState, EngineSupervisor, SupervisorOptions
from octavo.engine.watchdog import WatchSettings, dump_stacks
from octavo.errors import ConfigError, EngineDeadError, EngineRestartingError, OctavoError, QuarantinedError
from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from tests.unit.engine.fakes import CRASH, EXIT, FakeArgs

ROOT = Path(__file__).resolve().parents[3]
Work = Callable[[EngineSupervisor], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def _child_finds_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(work: Work, args: FakeArgs | None = None, **options: Any) -> None:
    """Run a coroutine with a supervised engine that takes five milliseconds per step."""

    async def main() -> None:
        fake: Any = args or FakeArgs(step_s=0.005)
        supervisor = EngineSupervisor.from_engine_args(
            fake, SupervisorOptions(**options), build="tests.unit.engine.fakes:build"
        )
        try:
            async with supervisor:
                await work(supervisor)
        finally:
            await asyncio.to_thread(supervisor.shutdown)

    asyncio.run(main())


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


async def is_ready(supervisor: EngineSupervisor) -> None:
    await until(lambda: supervisor.state is EngineState.READY, "ready")


def params(max_tokens: int = 4, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA, detokenize=False, n=n)


async def tokens(supervisor: EngineSupervisor, prompt: list[int], max_tokens: int, **more: Any) -> list[int]:
    outputs: list[RequestOutput] = [each async for each in supervisor.llm.generate(prompt, params(max_tokens), **more)]
    assert outputs[-1].finished
    return [token for output in outputs for token in output.outputs[0].token_ids]


def kill(supervisor: EngineSupervisor, with_signal: signal.Signals = signal.SIGKILL) -> int:
    pid = supervisor.engine_pid
    assert pid is not None
    os.kill(pid, with_signal)
    return pid


def test_open_streams_go_on_where_a_killed_engine_left_them() -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        assert supervisor.state is EngineState.LOADING
        with pytest.raises(EngineRestartingError, match="still loading"):
            _ = supervisor.llm.ready
        await is_ready(supervisor)
        streams = [asyncio.create_task(tokens(supervisor, [1, index], 150)) for index in range(20)]
        await until(lambda: supervisor.num_open == 20, "all begun")
        await asyncio.sleep(0.1)
        kill(supervisor)
        await until(lambda: supervisor.state is EngineState.RESTARTING, "noticed")
        late = asyncio.create_task(tokens(supervisor, [1], 3))
        with pytest.raises(EngineRestartingError):
            await supervisor.llm.check_health()
        for stream in [*streams, late]:
            wanted = 3 if stream is late else 150
            assert await stream == list(range(wanted - 1, -1, -1))
        assert supervisor.events.num_restarts == 1
        assert supervisor.events.last_gap_s > 0
        assert "signal 9" in (supervisor.events.last_death or "")
        assert supervisor.num_open == 0

    run(work)


def test_answers_of_several_are_replayed_each() -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        has_killed = False
        async for output in supervisor.llm.generate([1], params(40, n=3)):
            for answer in output.outputs:
                found[answer.index] += answer.token_ids
            if not has_killed and len(found[0]) >= 10:
                has_killed = True
                kill(supervisor)
        assert found == dict.fromkeys(range(3), list(range(39, -1, -1)))

    run(work)


@pytest.mark.parametrize("poison", [CRASH, EXIT])
def test_a_request_that_ends_the_engine_twice_is_quarantined_and_the_others_are_answered(poison: int) -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        streams = [asyncio.create_task(tokens(supervisor, [1, index], 400)) for index in range(10)]
        await asyncio.sleep(0.1)
        with pytest.raises(QuarantinedError, match="2 times"):
            await tokens(supervisor, [poison], 5)
        with pytest.raises(QuarantinedError, match="like this one"):
            await tokens(supervisor, [poison], 5)
        for stream in streams:
            assert await stream == list(range(399, -1, -1))
        assert supervisor.events.num_restarts == 2
        assert supervisor.state is EngineState.READY

    run(work)


def test_one_death_too_many_ends_it_with_the_cause() -> None:
    heard: list[OctavoError] = []

    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        stream = asyncio.create_task(tokens(supervisor, [1], 10**6))
        for death in range(2):
            await until(lambda: supervisor.num_open == 1, "running")
            pid = kill(supervisor)
            await until(lambda pid=pid: supervisor.engine_pid != pid, f"death {death} noticed")
            await until(
                lambda: supervisor.state in (EngineState.READY, EngineState.FAILED), "up again, or down for good"
            )
        assert supervisor.state is EngineState.FAILED and supervisor.errored
        with pytest.raises(EngineDeadError, match="2 times within 10 minutes.*signal 9"):
            await stream
        assert len(heard) == 1 and "signal 9" in heard[0].message
        with pytest.raises(EngineDeadError):
            await tokens(supervisor, [1], 1)

    run(work, policy=RestartPolicy(max_deaths=2, max_strikes=9), on_failed=heard.append)


def test_without_restarts_the_first_death_is_the_last() -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        stream = asyncio.create_task(tokens(supervisor, [1], 10**6))
        await until(lambda: supervisor.num_open == 1, "running")
        kill(supervisor)
        with pytest.raises(EngineDeadError, match="not to be restarted"):
            await stream

    run(work, policy=RestartPolicy(max_deaths=1))


def test_a_start_that_fails_is_told() -> None:
    heard: list[OctavoError] = []

    async def work(supervisor: EngineSupervisor) -> None:
        await until(lambda: supervisor.state is EngineState.FAILED, "failed")
        assert isinstance(supervisor.failure, ConfigError) and heard == [supervisor.failure]
        with pytest.raises(EngineDeadError, match="max_model_len is too large"):
            await supervisor.llm.check_health()

    run(work, FakeArgs(error="config"), on_failed=heard.append)


def test_a_stopped_engine_is_noticed_described_and_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        stream = asyncio.create_task(tokens(supervisor, [1], 300))
        await asyncio.sleep(0.2)
        pid = kill(supervisor, signal.SIGSTOP)
        await until(lambda: supervisor.state is EngineState.STALLED, "noticed")
        assert "no step has finished" in supervisor.describe()
        assert await stream == list(range(299, -1, -1))
        assert "no step" in (supervisor.events.last_death or "")
        await until(lambda: not psutil.pid_exists(pid), "the old process is gone")

    run(work, watch=WatchSettings(unready_after_s=0.5, dump_after_s=1.0, restart_after_s=2.5))
    assert "in dump_stacks" in capfd.readouterr().err


def test_the_stacks_of_a_working_engine_can_be_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        dump_stacks(supervisor.engine_pid)
        assert await tokens(supervisor, [1], 3) == [2, 1, 0]

    run(work)
    printed = capfd.readouterr().err
    assert "core.py" in printed and "in _peek" in printed


def test_an_idle_engine_that_stands_still_is_no_hang() -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        assert await tokens(supervisor, [1], 3) == [2, 1, 0]
        await asyncio.sleep(1.5)
        assert supervisor.state is EngineState.READY and supervisor.events.num_restarts == 0

    run(work, watch=WatchSettings(unready_after_s=0.2, dump_after_s=0.4, restart_after_s=0.8))


def test_aborts_during_a_restart_are_answered_at_once() -> None:
    async def work(supervisor: EngineSupervisor) -> None:
        await is_ready(supervisor)
        stream = asyncio.create_task(tokens(supervisor, [1], 10**6, request_id="mine"))
        await until(lambda: supervisor.num_open == 1, "running")
        await asyncio.sleep(0.05)
        kill(supervisor)
        await until(lambda: supervisor.state is EngineState.RESTARTING, "noticed")
        await supervisor.llm.abort("mine")
        await stream
        assert supervisor.num_open == 0

    run(work)


def test_shutdown_while_loading_and_while_restarting_leaves_no_process() -> None:
    others = engines()  # of a server that tests share
    for moment in (EngineState.LOADING, EngineState.RESTARTING):

        async def work(supervisor: EngineSupervisor, moment: EngineState = moment) -> None:
            if moment is EngineState.RESTARTING:
                await is_ready(supervisor)
                kill(supervisor)
            await until(lambda: supervisor.state is moment, moment.value)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(supervisor.shutdown)

        run(work)
        until_s = time.monotonic() + 20
        while (left := engines() - others) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert not left


def engines() -> set[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return {
        each for each in children if each.status() != psutil.STATUS_ZOMBIE and "core_main" in " ".join(each.cmdline())
    }

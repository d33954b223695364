"""A server of real processes whose engine is killed and stopped, whose clients vanish, and that is told to end.

Small, for every change. The same at full size, with SmolLM2 and figures: ``python -m tests.chaos.run``.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos import scenarios
from tests.chaos.client import ask, completion
from tests.chaos.process import WAIT_S, ServerProcess, make_tiny_model, serving

Scenario = Callable[[ServerProcess], Coroutine[Any, Any, Any]]
Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path, smollm2_gguf: Path) -> Play:
    """Run a scenario against a server of its own, which is over afterwards."""

    def run(scenario: Scenario, *flags: str, wait: bool = True, max_files: int | None = None) -> None:
        model = make_tiny_model(tmp_path)
        everything = [
            str(model), "--served-model-name", "m", "--load-format", "dummy", "--tokenizer", str(smollm2_gguf),
            "--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "400", *flags,
        ]  # fmt: skip

        async def main() -> None:
            try:
                async with asyncio.timeout(2 * WAIT_S):
                    if wait:
                        await server.until_ready()
                    await scenario(server)
            except TimeoutError:
                server.dump_stacks()
                await asyncio.sleep(1)
                raise AssertionError(f"the scenario hangs; status of the server: {server.process.poll()}") from None

        with serving(everything, tmp_path / "log", max_files) as server:
            family = psutil.Process(server.process.pid)
            asyncio.run(main())
            if server.process.poll() is not None:
                assert not family.is_running() or family.status() == psutil.STATUS_ZOMBIE

    return run


def test_streams_survive_the_engine_clients_may_vanish_and_sigterm_loses_nothing(play: Play) -> None:
    async def scenario(server: ServerProcess) -> None:
        await scenarios.kill_under_streams(server, 12, 60)
        await scenarios.vanishing_clients(server, 30, 100)
        await scenarios.sigterm_under_load(server, 10, 150)

    play(scenario)


def test_several_http_processes_survive_each_other_and_a_second_sigterm_ends_all_at_once(play: Play) -> None:
    async def scenario(server: ServerProcess) -> None:
        await scenarios.requests_of_siblings(server, 4)
        await scenarios.several_http_processes(server, 12, 60)
        await scenarios.second_sigterm(server)

    play(scenario, "--api-server-count", "2", "--num-gpu-blocks-override", "1200")


def test_more_connections_than_files_are_told_so_and_harm_nobody(play: Play) -> None:
    play(lambda server: scenarios.more_connections_than_files(server, 256), max_files=256)


@pytest.mark.slow
def test_a_hung_engine_is_noticed_and_replaced(play: Play) -> None:
    play(lambda server: scenarios.hung_engine(server, 4, 150), "--stall-timeout", "1", "--hang-timeout", "5")


@pytest.mark.slow
def test_three_deaths_end_the_server_with_the_cause(play: Play) -> None:
    play(scenarios.three_deaths)


def test_loading_is_visible_and_can_be_interrupted(play: Play) -> None:
    async def scenario(server: ServerProcess) -> None:
        await server.until(200, "/livez")
        health = await ask(server.port, "/health")
        answer = await ask(server.port, "/v1/completions", completion(1, 5))
        for each in (health, answer):
            assert each.status == 503 and each.error is not None and "still loading" in each.error["message"]
            assert int(each.headers["retry-after"]) >= 1
        server.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(server.wait) == 0
        assert "Traceback" not in server.log.read_text()

    play(scenario, wait=False)


def test_a_model_that_is_not_there_ends_the_server_with_one_line(play: Play) -> None:
    async def scenario(server: ServerProcess) -> None:
        assert await asyncio.to_thread(server.wait) != 0
        last = server.log.read_text().strip().splitlines()[-1]
        assert "error:" in last and "no-such-source" in last and "Traceback" not in server.log.read_text()

    play(scenario, "--load-format", "no-such-source", wait=False)

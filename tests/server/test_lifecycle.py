"""What is said about a server in each state, and what a signal does; with an engine whose state the test sets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from octavo.config.server import ServerConfig
from octavo.engine.supervisor import EngineState
from octavo.errors import CheckpointError, ConfigError, EngineDeadError, OctavoError
from octavo.server import listen
from octavo.server.admission import Admission
from octavo.server.app import build_app
from octavo.server.guarded import layers
from octavo.server.lifecycle import Lifecycle, first_line
from octavo.server.service import Service
from tests.waiting import WAIT_S


class FakeEngine:
    def __init__(self, state: EngineState = EngineState.READY) -> None:
        self.state = state
        self.was_shut_down = False

    def describe(self) -> str:
        return f"it is {self.state.value}"

    def shutdown(self) -> None:
        self.was_shut_down = True


class FakeServer:
    def __init__(self) -> None:
        self.stopped: list[bool] = []

    def stop(self, *, at_once: bool) -> None:
        self.stopped.append(at_once)


def make(state: EngineState = EngineState.READY, timeout_s: float = 5.0) -> tuple[Lifecycle, FakeEngine, Admission]:
    engine: Any = FakeEngine(state)
    admission = Admission()
    lifecycle = Lifecycle(engine, admission, timeout_s)
    admission.refuse = lifecycle.refusal
    return lifecycle, engine, admission


EXPECTED = {
    #                        livez health readyz a request
    EngineState.LOADING: (200, 503, 503, 503),
    EngineState.READY: (200, 200, 200, 404),
    EngineState.RESTARTING: (200, 503, 503, 404),
    EngineState.STALLED: (200, 503, 503, 404),
    EngineState.FAILED: (200, 503, 503, 503),
    "draining": (200, 200, 503, 503),
}


@pytest.mark.parametrize("state", list(EXPECTED))
def test_what_is_said_in_each_state(state: EngineState | str) -> None:
    lifecycle, _, admission = make(state if isinstance(state, EngineState) else EngineState.READY)
    lifecycle.is_draining = state == "draining"
    config = ServerConfig()
    service = Service(config=config, lifecycle=lifecycle, admission=admission)
    service.layers += layers(config, admission)
    client = TestClient(build_app(service))
    live, health, ready, request = EXPECTED[state]
    for path, status in (
        ("/livez", live), ("/health/live", live), ("/health", health), ("/ping", health), ("/readyz", ready),
        ("/health/ready", ready),
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == status, path
        if status == 200:
            assert answer.json()["status"] == lifecycle.phase
        else:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert int(answer.headers["retry-after"]) >= 1
    assert client.post("/ping").status_code == health
    # A route that does not exist shows whether requests are let through at all.
    assert client.post("/v1/nope", json={}).status_code == request
    assert client.get("/load").json() == {"server_load": 0}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_drain_waits_for_what_is_open_and_lets_nothing_in() -> None:
    async def main() -> None:
        lifecycle, engine, admission = make()
        server = FakeServer()
        lifecycle.attach(server, asyncio.get_running_loop())
        ticket = admission.enter(0)
        lifecycle.on_signal(signal.SIGTERM)
        await until(lambda: lifecycle.is_draining)
        with pytest.raises(OctavoError, match="shutting down"):
            admission.enter(0)
        await asyncio.sleep(0.2)
        assert not server.stopped
        ticket.close()
        await until(lambda: bool(server.stopped))
        assert server.stopped == [False] and lifecycle.status == 0 and not engine.was_shut_down

    asyncio.run(main())


def test_what_is_not_finished_in_time_is_ended() -> None:
    async def main() -> None:
        lifecycle, engine, admission = make(timeout_s=0.1)
        server = FakeServer()
        lifecycle.attach(server, asyncio.get_running_loop())
        ticket = admission.enter(0)
        lifecycle.on_signal(signal.SIGTERM)
        await until(lambda: engine.was_shut_down)
        ticket.close()  # its stream has got the error
        await until(lambda: bool(server.stopped))
        assert lifecycle.status == 0

    asyncio.run(main())


def test_a_second_signal_stops_at_once() -> None:
    async def main() -> None:
        lifecycle, _, admission = make()
        server = FakeServer()
        lifecycle.attach(server, asyncio.get_running_loop())
        admission.enter(0)
        lifecycle.on_signal(signal.SIGTERM)
        lifecycle.on_signal(signal.SIGTERM)
        await until(lambda: bool(server.stopped))
        assert server.stopped == [True] and lifecycle.status == 128 + signal.SIGTERM
        lifecycle.on_signal(signal.SIGTERM)  # further ones change nothing
        await asyncio.sleep(0.05)
        assert server.stopped == [True]

    asyncio.run(main())


def test_a_signal_before_the_server_listens_is_not_lost() -> None:
    async def main() -> None:
        lifecycle, _, _ = make(EngineState.LOADING)
        server = FakeServer()
        lifecycle.on_signal(signal.SIGINT)
        lifecycle.attach(server, asyncio.get_running_loop())
        await until(lambda: bool(server.stopped))
        assert lifecycle.status == 0

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_does_not_hide_a_failure(when: str) -> None:
    # vLLM #48966: the engine is dead, an orchestrator sends SIGTERM, and the status says that all is well.
    async def main() -> None:
        lifecycle, _, admission = make()
        server = FakeServer()
        lifecycle.attach(server, asyncio.get_running_loop())
        ticket = admission.enter(0)
        if when == "before":
            lifecycle.on_signal(signal.SIGTERM)
            await until(lambda: lifecycle.is_draining)
        lifecycle.on_engine_failed(EngineDeadError("it fell over"))
        lifecycle.on_engine_failed(EngineDeadError("a later cause"))
        if when == "after":
            lifecycle.on_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        ticket.close()
        await until(lambda: bool(server.stopped))
        assert lifecycle.status == 70 and lifecycle.failure is not None and lifecycle.failure.message == "it fell over"
        assert lifecycle.phase == "failed"

    asyncio.run(main())


def test_a_failure_before_the_server_listens_ends_it() -> None:
    async def main() -> None:
        lifecycle, _, _ = make(EngineState.LOADING)
        server = FakeServer()
        lifecycle.on_engine_failed(ConfigError("no such model"))
        lifecycle.attach(server, asyncio.get_running_loop())
        await until(lambda: bool(server.stopped))
        assert lifecycle.status == 70

    asyncio.run(main())


def test_the_last_line_is_one_line() -> None:
    assert first_line(EngineDeadError("it failed: RuntimeError: x\nTraceback\n  File")) == "it failed: RuntimeError: x"
    assert first_line(EngineDeadError("could not start:\nTraceback\n  File\nValueError: y\n")) == (
        "could not start: ValueError: y"
    )
    assert first_line(CheckpointError("a.gguf", "is cut off")) == "a.gguf: is cut off"
    assert first_line(EngineDeadError("")) == "EngineDeadError"


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with listen.bind(ServerConfig(host="127.0.0.1", port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port is {port}, but it is in use") as caught:
            listen.bind(ServerConfig(host="127.0.0.1", port=port))
        assert caught.value.param == "port"
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen.bind(ServerConfig(host="203.0.113.7", port=0))


def test_a_socket_left_over_is_replaced_and_a_file_is_not(tmp_path: Any) -> None:
    path = tmp_path / "octavo.sock"
    listen.bind(ServerConfig(uds=str(path))).close()
    listen.bind(ServerConfig(uds=str(path))).close()
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="uds"):
        listen.bind(ServerConfig(uds=str(file)))
    assert file.read_text() == "precious"

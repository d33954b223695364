"""The parent of several HTTP processes, without any. Red when a server that is told to end waits for ever."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.engine.blame import RestartPolicy
from octavo.errors import EngineDeadError
from octavo.server import workers
from octavo.server.workers import Announce, EngineOwner
from tests.waiting import join


def test_the_end_may_come_just_before_another_engine_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    is_starting, may_start, is_killed = threading.Event(), threading.Event(), threading.Event()
    make_addresses = workers.make_addresses

    def slow_addresses(count: int) -> Any:
        addresses = make_addresses(count)
        is_starting.set()
        assert may_start.wait(60)
        return addresses

    def spawn(_addresses: Any, _args: Any) -> tuple[Any, int]:
        death_fd, other = os.pipe()
        os.close(other)
        process = SimpleNamespace(
            pid=1, kill=is_killed.set, terminate=is_killed.set, wait=lambda _timeout=None: -9, stdin=None
        )
        return process, death_fd

    def attach(*_: Any) -> Any:
        assert is_killed.wait(60), "nobody ended the engine that was started last"
        raise EngineDeadError("killed")

    monkeypatch.setattr(workers, "make_addresses", slow_addresses)
    monkeypatch.setattr(workers, "spawn_engine", spawn)
    monkeypatch.setattr(workers, "attach", attach)
    args: Any = None
    owner = EngineOwner(args, 1, RestartPolicy(), Announce())
    assert is_starting.wait(60)
    closing = threading.Thread(target=owner.close, name="close", daemon=True)
    closing.start()
    closing.join(0.3)  # it has looked for something to end, and found nothing
    may_start.set()
    join(closing, 30)
    assert owner.failure is None

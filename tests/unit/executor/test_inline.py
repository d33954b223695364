"""The executor of one worker passes every verb on, in order, and the registry finds executors by name or path."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.executor.inline import InlineExecutor
from octavo.executor.registry import EXECUTORS


class Worker:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def load(self) -> Any:
        self.calls.append(("load",))
        return "report"

    def allocate(self, num_blocks: int) -> None:
        self.calls.append(("allocate", num_blocks))

    def warm_up(self) -> bool:
        self.calls.append(("warm_up",))
        return True

    def forward(self, plan: Any, mask: bytes | None) -> Any:
        self.calls.append(("forward", plan, mask))
        return "future"

    def sample(self, step_id: int, mask: bytes | None) -> None:
        self.calls.append(("sample", step_id, mask))


def test_verbs_reach_the_worker() -> None:
    worker = Worker()
    executor = InlineExecutor(worker)
    assert executor.start() == "report"
    executor.allocate(7)
    assert executor.warm_up()
    plan: Any = object()
    assert executor.forward(plan, b"mask") == "future"
    executor.sample(3, None)
    executor.shutdown()
    first = [("load",), ("allocate", 7), ("warm_up",)]
    assert worker.calls == [*first, ("forward", plan, b"mask"), ("sample", 3, None)]


def test_known_but_absent_names_say_why() -> None:
    assert EXECUTORS.resolve_name("uni") == "inline"
    with pytest.raises(ConfigError, match="one device"):
        EXECUTORS.load("ray")

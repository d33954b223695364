"""Red when garbage that refers to itself stays for good, or when all is looked at while many requests are open."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from octavo.utils.collector import LATEST_S, QUIET, Collector


class Node:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def old_garbage() -> Iterator[weakref.ref[Node]]:
    """A cycle that young collections have passed by while it was in use."""
    thresholds = gc.get_threshold()
    gc.collect()
    node = Node()
    for generation in (0, 1):
        gc.collect(generation)
    found = weakref.ref(node)
    del node
    gc.collect(1)
    gc.collect(1)
    assert found() is not None
    yield found
    gc.set_threshold(*thresholds)


def test_garbage_goes_at_a_quiet_moment_or_at_last(old_garbage: weakref.ref[Node]) -> None:
    num_open, now_s = QUIET + 1, 100.0
    collector = Collector(lambda: num_open, lambda: now_s)
    assert not collector.collect_if_due() and old_garbage() is not None
    num_open = QUIET
    assert collector.collect_if_due() and old_garbage() is None


def test_a_process_that_is_never_quiet(old_garbage: weakref.ref[Node]) -> None:
    now_s = 100.0
    collector = Collector(lambda: 1000, lambda: now_s)
    now_s += LATEST_S - 1
    assert not collector.collect_if_due()
    now_s += 2
    assert collector.collect_if_due() and old_garbage() is None
    _ = [Node() for _ in range(10)]
    gc.collect(1)
    assert not collector.collect_if_due()  # the next time is counted from here

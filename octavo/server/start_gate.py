"""Requests begin a few per turn of the event loop.

To begin is the longest piece of work that a request does in one go: its body is parsed and checked, its text rendered
and tokenized. Were all begun that have come in a burst, everybody else would wait for all of them at once: streams for
their tokens, health checks for their answer. Whoever will be refused anyway does not wait. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

PER_TURN = 2
"""At about a millisecond each: a turn of the loop stays short, and what it costs by itself is little beside them."""


class StartGate:
    """Of one event loop. What finds no place in the turn at hand waits in line.

    Args:
        per_turn: How many may begin in one turn.
    """

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._num_left = per_turn
        self._is_armed = False
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def num_waiting(self) -> int:
        """How many stand in line."""
        return len(self._waiting)

    def put(self, loop: asyncio.AbstractEventLoop, start: Callable[[], None]) -> None:
        """Call ``start``, now or in one of the next turns.

        Args:
            loop: The running one.
            start: Must not raise.
        """
        if not self._is_armed:
            self._is_armed = True
            loop.call_soon(self._turn, loop)
        if self._num_left > 0 and not self._waiting:
            self._num_left -= 1
            start()
        else:
            self._waiting.append(start)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_left = self._per_turn
        while self._waiting and self._num_left > 0:
            self._num_left -= 1
            self._waiting.popleft()()
        self._is_armed = self._num_left < self._per_turn
        if self._is_armed:
            loop.call_soon(self._turn, loop)

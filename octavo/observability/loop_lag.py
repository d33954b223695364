"""How late an event loop comes to what is due: the time that whatever it does at the moment takes away from all others.

A timer notes its own lateness. Knows no metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.1


class LoopLag:
    """Watches the running loop until ``stop``.

    Args:
        observe: Gets seconds of lateness, one for each time that the timer was due: a loop that is held up for a second
            has been late for all of them.
        interval_s: Between two of these times.
    """

    def __init__(self, observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
        self._observe = observe
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._due_s = time.monotonic() + interval_s  # uvloop's own time stands still within a turn
        self._timer = self._loop.call_later(interval_s, self._look)

    def stop(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _look(self) -> None:
        now_s = time.monotonic()
        while self._due_s <= now_s:
            self._observe(now_s - self._due_s)
            self._due_s += self._interval_s
        self._timer = self._loop.call_later(self._due_s - now_s, self._look)

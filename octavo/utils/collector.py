"""When the garbage collector of a busy process may look at everything.

A full collection visits every object that could be part of a cycle, and all else waits: with thousands of open streams
for half a second, as often as their number has grown by a quarter. Nearly nothing is found, for what a request leaves
behind is freed by its counts of references. So full collections are taken from the interpreter and made here: at
moments when there is little to visit, and after some minutes in any case. Young objects are the interpreter's as ever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
LOOK_S = 5.0
QUIET = 50
"""Open requests up to which a full collection takes some milliseconds only."""
LATEST_S = 600.0
"""A process that is never quiet is held up once in this time."""
YOUNG, MIDDLE, NEVER = 5_000, 5, 1_000_000
"""Thresholds of the interpreter's three generations: young collections are rarer than by default, for most of what a
request makes is gone by the time of the next one, and each stays below some ten milliseconds."""


class Collector:
    """Full collections of one process, made by its event loop.

    Args:
        num_open: How many requests are open.
        clock: ``time.monotonic``.
    """

    def __init__(self, num_open: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._num_open = num_open
        self._clock = clock
        self._last_s = clock()
        self._timer: asyncio.TimerHandle | None = None

    def take_over(self) -> None:
        """From now on full collections are made here. What there is by now (modules, routes) stays as long as the
        process, and is never looked at again."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG, MIDDLE, NEVER)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look for a good moment every few seconds, as long as the loop runs."""
        self._timer = loop.call_later(LOOK_S, self._look, loop)

    def collect_if_due(self) -> bool:
        """Make a full collection if there is something to look at and this is the moment; whether it was."""
        now_s = self._clock()
        if gc.get_count()[2] == 0 and gc.get_count()[1] == 0:
            return False  # next to nothing was made since the last one
        if self._num_open() > QUIET and now_s < self._last_s + LATEST_S:
            return False
        num_found = gc.collect()
        self._last_s = self._clock()
        if self._last_s - now_s > 0.1:
            logger.debug("a full garbage collection took %.2f s and found %d objects", self._last_s - now_s, num_found)
        return True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.collect_if_due()
        self.start(loop)

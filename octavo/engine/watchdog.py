"""Notices an engine that does not get on, says what every process is doing, and ends it so that another can start.

Looks at the engine's ``Heartbeat`` from outside: work that waits while no step finishes is a hang, whatever its
reason, and no answer of the engine is needed to see it. Knows processes by their ids only.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.engine.heartbeat import DUMP_SIGNAL

logger = logging.getLogger(__name__)
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Seconds without a finished step, with work waiting, until something is done about it."""

    unready_after_s: float = 10.0
    """The server says that it is not ready."""
    dump_after_s: float = 30.0
    """The stacks of all processes go to the log."""
    restart_after_s: float = 120.0
    """The engine is ended, and started again."""


class WatchedEngine(Protocol):
    """What is looked at."""

    def num_steps(self) -> int | None:
        """Finished steps of the engine that lives; None while none does, or before it is ready."""
        ...

    def has_work(self) -> bool:
        """Whether anybody waits for a step."""
        ...

    def pid(self) -> int | None:
        """Of the engine process; None while there is none."""
        ...


class StallClock:
    """For how long there has been work and no finished step."""

    def __init__(self) -> None:
        self._num_steps: int | None = None
        self._since_s: float | None = None

    def update(self, now_s: float, num_steps: int | None, has_work: bool) -> float:
        """Take a look.

        Args:
            now_s: ``time.monotonic()``.
            num_steps: See ``WatchedEngine.num_steps``.
            has_work: See ``WatchedEngine.has_work``.

        Returns:
            Seconds of standstill, as far as looks can tell: 0 when the last step is news.
        """
        if num_steps is None or not has_work:
            self._since_s = None
        elif num_steps != self._num_steps or self._since_s is None:
            self._since_s = now_s
        self._num_steps = num_steps
        return 0.0 if self._since_s is None else now_s - self._since_s


class Watchdog:
    """A thread that looks twice a second.

    Args:
        engine: What to look at.
        settings: How long to wait.
        end_engine: Ends the process at once; called with the reason.
    """

    def __init__(self, engine: WatchedEngine, settings: WatchSettings, end_engine: Callable[[str], None]) -> None:
        self._engine = engine
        self._settings = settings
        self._end_engine = end_engine
        self._clock = StallClock()
        self._stalled_s = 0.0
        self._has_dumped = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="octavo-watchdog", daemon=True)
        self._thread.start()

    @property
    def stalled_s(self) -> float:
        """Seconds without a step although work waits; 0 while all is well."""
        return self._stalled_s

    @property
    def is_stalled(self) -> bool:
        """Whether it takes too long to call the server ready."""
        return self._stalled_s >= self._settings.unready_after_s

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            engine = self._engine
            self._stalled_s = self._clock.update(time.monotonic(), engine.num_steps(), engine.has_work())
            if self._stalled_s == 0.0:
                self._has_dumped = False
            elif self._stalled_s >= self._settings.restart_after_s:
                self._end()
            elif self._stalled_s >= self._settings.dump_after_s and not self._has_dumped:
                self._has_dumped = True
                self._dump()

    def _dump(self) -> None:
        pid = self._engine.pid()
        logger.error(
            "the engine has finished no step for %.0f s although requests wait%s; stacks of all processes follow, and "
            "it is restarted after %.0f s",
            self._stalled_s,
            "" if pid is None else f" (process {pid}, {describe_process(pid)})",
            self._settings.restart_after_s,
        )
        dump_stacks(pid)

    def _end(self) -> None:
        reason = f"the engine had finished no step for {self._stalled_s:.0f} s although requests waited"
        logger.error("%s: it is ended", reason)
        self._clock = StallClock()
        self._stalled_s = 0.0
        self._has_dumped = False
        self._end_engine(reason)


def dump_stacks(engine_pid: int | None) -> None:
    """Print the stacks of all threads of this process and of the engine to standard error."""
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    if engine_pid is not None:
        try:
            os.kill(engine_pid, DUMP_SIGNAL)
        except ProcessLookupError:
            logger.warning("process %d is gone", engine_pid)


def describe_process(pid: int) -> str:
    """What the system says of a process: ``stopped``, ``sleeping``, ...; nothing where it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "state unknown"
    states = [line.partition(":")[2].strip() for line in lines if line.startswith("State:")]
    return f"state {states[0]}" if states else "state unknown"


def end_group(pid: int) -> None:
    """Kill a process that leads a session of its own, and all that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return

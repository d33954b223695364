"""Lifecycle: from the first listening socket to the exit status. What is said about readiness is decided here.

Signals begin a drain: open requests may finish, new ones are told to come back elsewhere. A second signal, or the end
of the time, ends what is left. An engine that is gone for good ends the server with a status of its own and the cause
as the last line. Which web server runs is ``listen.py``'s matter; nothing here knows routes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from typing import Protocol

from octavo.engine.supervisor import EngineState, EngineSupervisor
from octavo.errors import OctavoError
from octavo.server.admission import Admission
from octavo.server.service import NotReadyError
from octavo.utils.collector import Collector

logger = logging.getLogger(__name__)
EXIT_ENGINE_FAILED = 70
"""EX_SOFTWARE: a supervisor such as systemd restarts what ends like this."""
LAST_WORDS_S = 3.0
"""How long streams get to send the error that ended them."""
POLL_S = 0.05


class Stoppable(Protocol):
    """The web server, as its lifecycle sees it."""

    def stop(self, *, at_once: bool) -> None:
        """Close the sockets and return from serving; ``at_once`` without waiting for open answers."""
        ...


class Lifecycle:
    """One HTTP process.

    Args:
        engine: Not started yet, or starting.
        admission: Knows what is open.
        shutdown_timeout_s: How long a drain may take.
    """

    def __init__(self, engine: EngineSupervisor, admission: Admission, shutdown_timeout_s: float) -> None:
        self._engine = engine
        self._admission = admission
        self._shutdown_timeout_s = shutdown_timeout_s
        self._server: Stoppable | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._num_signals = 0
        self._early_signal: int | None = None
        self.is_draining = False
        self.failure: OctavoError | None = None
        self.status = 0
        """To exit with."""
        self.collector: Collector | None = None
        """Makes full garbage collections at moments when few requests are open."""

    # --------------------------------------------------------------------------------------------------- how it is

    @property
    def phase(self) -> str:
        """``loading``, ``ready``, ``restarting``, ``stalled``, ``draining`` or ``failed``."""
        if self.failure is not None:
            return "failed"
        return "draining" if self.is_draining else self._engine.state.value

    @property
    def num_open(self) -> int:
        """Requests that make the engine work."""
        return self._admission.num_requests

    def is_full(self, num_before: int) -> bool:
        """Whether a request that stands behind ``num_before`` others will be refused."""
        return self._admission.is_full(num_before)

    def refusal(self) -> OctavoError | None:
        """Why no request is let in now; None if they are. A restart is no reason: requests wait for its end."""
        if self.is_draining:
            return NotReadyError("the server is shutting down", retry_after_s=max(1.0, self._shutdown_timeout_s))
        if self._engine.state in (EngineState.LOADING, EngineState.FAILED, EngineState.CLOSED):
            return NotReadyError(self._engine.describe(), retry_after_s=1.0)
        return None

    def unhealthy(self) -> OctavoError | None:
        """Why the engine does not work as it should; None if it does. A drain is no illness."""
        if self._engine.state is EngineState.READY:
            return None
        return NotReadyError(self._engine.describe())

    def unready(self) -> OctavoError | None:
        """Why no traffic should come here now; None if it should."""
        return self.refusal() if self.is_draining else self.unhealthy()

    # ---------------------------------------------------------------------------------------------------- the end

    def attach(self, server: Stoppable, loop: asyncio.AbstractEventLoop) -> None:
        """The web server runs in this loop from now on."""
        self._server, self._loop = server, loop
        if self.collector is not None:
            self.collector.start(loop)
        if self.failure is not None:
            self._end_for_failure()
        elif self._early_signal is not None:
            self._begin_drain(self._early_signal)

    def on_signal(self, number: int) -> None:
        """SIGTERM or SIGINT; from a signal handler, whatever it has interrupted."""
        if self._loop is None:
            self._early_signal = number
        else:
            self._loop.call_soon_threadsafe(self._begin_drain, number)

    def on_engine_failed(self, error: OctavoError) -> None:
        """There will be no engine any more; from any thread. The first cause stays, whatever comes after. A drain that
        has nothing left to lose does not care."""
        if self.failure is None and (not self.is_draining or self._admission.num_requests):
            self.failure = error
            self.status = EXIT_ENGINE_FAILED
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._end_for_failure)

    def _begin_drain(self, number: int) -> None:
        self._num_signals += 1
        name = signal.Signals(number).name
        if self.failure is not None or self._num_signals > 2:
            return  # it is ending already, and with the status that it has
        if self._num_signals > 1:
            logger.warning("%s again: %d open requests are ended", name, self._admission.num_requests)
            self.status = 128 + number if self._admission.num_requests else self.status
            self._stop(at_once=True)
            return
        self.is_draining = True
        open_ = self._admission.num_requests
        if open_:
            logger.info("%s: %d open requests get %g s to finish", name, open_, self._shutdown_timeout_s)
        else:
            logger.info("%s: nothing is open, the server ends", name)
        self._drain = asyncio.ensure_future(self._wait_for_the_last())

    async def _wait_for_the_last(self) -> None:
        deadline_s = time.monotonic() + self._shutdown_timeout_s
        while self._admission.num_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
        left = self._admission.num_requests
        if left:
            logger.warning("%d requests were not finished after %g s and are ended", left, self._shutdown_timeout_s)
            # Their readers get an error that says so, and a moment to read it.
            await asyncio.to_thread(self._engine.shutdown)
            await self._last_words()
        self._stop(at_once=False)

    def _end_for_failure(self) -> None:
        async def end() -> None:
            await self._last_words()
            self._stop(at_once=True)

        self._drain = asyncio.ensure_future(end())

    async def _last_words(self) -> None:
        deadline_s = time.monotonic() + LAST_WORDS_S
        while self._admission.num_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)

    def _stop(self, *, at_once: bool) -> None:
        if self._server is not None:
            self._server.stop(at_once=at_once)


def first_line(error: OctavoError) -> str:
    """An error in one line, for the last one of a log: an engine's cause may bring its whole stack, which ends with
    what was raised."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]

"""EngineSupervisor: there before the engine of its AsyncLLM is, and outlives every one.

The engine process is started in the background, started again when it ends, and ended when it hangs; requests that
were open go on. What is left for users to see is a state, a sentence, and numbers. How replaying works is in
``replay.py``, who is blamed in ``blame.py``, hangs in ``watchdog.py``. Never imports torch.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.config.args import EngineArgs
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.blame import RestartPolicy
from octavo.engine.client import EngineClient, ZmqClient
from octavo.engine.frontend import assemble
from octavo.engine.launch import BUILD, LaunchListener, OnStarting, launch_engine
from octavo.engine.replay import Launch, ReplayingClient
from octavo.engine.watchdog import Watchdog, WatchSettings, end_group
from octavo.errors import EngineDeadError, EngineRestartingError, OctavoError
from octavo.messages import EngineReady
from octavo.utils.logging import with_detail

logger = logging.getLogger(__name__)


class EngineState(enum.Enum):
    """Where the engine is."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    STALLED = "stalled"
    """It lives, work waits, and no step finishes."""
    FAILED = "failed"
    """It could not start, or has ended too often."""
    CLOSED = "closed"


@dataclass(slots=True)
class EngineEvents:
    """What has happened to the engine so far, for metrics."""

    num_restarts: int = 0
    num_replayed: int = 0
    """Sequences that were open when an engine ended, over all restarts."""
    last_gap_s: float = 0.0
    """From the last death to the next engine."""
    last_death: str | None = None
    """Its cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """What a supervisor does by itself."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    watch: WatchSettings = field(default_factory=WatchSettings)
    log_stats: bool = False
    client_index: int = 0
    """Which frontend of the engine this is."""
    on_phase: Callable[[str], None] | None = None
    """Called, from another thread, with what an engine that starts does now, in words."""
    on_ready: Callable[[], None] | None = None
    """Called once, from another thread, when the first engine takes requests."""
    on_failed: Callable[[OctavoError], None] | None = None
    """Called once, from another thread, when there will be no engine any more."""


class EngineSupervisor:
    """An engine for asyncio that comes back. ``start`` it; its ``llm`` serves.

    Args:
        launch: Starts one engine process and waits until it takes requests.
        options: Limits and listeners.
    """

    def __init__(self, launch: Launch, options: SupervisorOptions | None = None) -> None:
        self._launch = launch
        self._options = options or SupervisorOptions()
        self.events = EngineEvents()
        self._phase = "starting the engine process"
        self._started_s = time.monotonic()
        self._client: ReplayingClient | None = None
        self._llm: AsyncLLM | None = None
        self._failure: OctavoError | None = None
        self._is_closing = False
        self._starting: Any = None
        self._kill_reason: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._start, name="octavo-engine-start", daemon=True)
        self._watchdog: Watchdog | None = None

    @classmethod
    def from_engine_args(
        cls, args: EngineArgs, options: SupervisorOptions | None = None, *, build: str = BUILD
    ) -> EngineSupervisor:
        """A supervisor of an engine in a child process; not started yet."""
        return cls(launcher(args, build), options)

    def start(self) -> None:
        """Begin to start the engine, in the background. Once."""
        self._thread.start()

    def wait_loaded(self, timeout_s: float) -> None:
        """Wait until the first start has succeeded or failed, or the time is up."""
        self._thread.join(timeout_s)

    # --------------------------------------------------------------------------------------------------- how it is

    @property
    def state(self) -> EngineState:
        """Where the engine is now."""
        if self._failure is not None:
            return EngineState.FAILED
        if self._is_closing:
            return EngineState.CLOSED
        client = self._client
        if self._llm is None or client is None:
            return EngineState.LOADING
        if client.client is None:
            return EngineState.RESTARTING
        if self._watchdog is not None and self._watchdog.is_stalled:
            return EngineState.STALLED
        return EngineState.READY

    @property
    def failure(self) -> OctavoError | None:
        """Why there will be no engine any more; None while there may be one."""
        return self._failure

    def describe(self) -> str:
        """The state in a sentence."""
        match self.state:
            case EngineState.LOADING:
                return f"the model is still loading: {self._phase} ({time.monotonic() - self._started_s:.0f} s so far)"
            case EngineState.RESTARTING:
                return f"the engine is being restarted: {self._phase}"
            case EngineState.STALLED:
                return f"requests wait, but no step has finished for {self.stalled_s:.0f} s"
            case EngineState.FAILED:
                return "the engine has ended"
            case EngineState.CLOSED:
                return "the server is shutting down"
            case EngineState.READY:
                return "ready"

    @property
    def phase(self) -> str:
        """What an engine that starts is doing."""
        return self._phase

    @property
    def stalled_s(self) -> float:
        """Seconds without a step although work waits."""
        return 0.0 if self._watchdog is None else self._watchdog.stalled_s

    @property
    def num_open(self) -> int:
        """Unfinished sequences."""
        return 0 if self._client is None else self._client.num_open

    @property
    def engine_pid(self) -> int | None:
        """Of the engine process that lives; None while there is none, or none of ours."""
        client = None if self._client is None else self._client.client
        return client.process.pid if isinstance(client, ZmqClient) else None

    # ------------------------------------------------------------------------------------------------ who serves

    @property
    def llm(self) -> AsyncLLM:
        """What does the work, from the first start on: an engine's end in between is a pause.

        Raises:
            EngineRestartingError: It is loading for the first time.
            EngineDeadError: It could not be started.
        """
        if self._llm is None:
            if self._failure is not None:
                raise EngineDeadError(self._failure.message) from self._failure
            raise EngineRestartingError(self.describe())
        return self._llm

    @property
    def errored(self) -> bool:
        """Whether there will be no engine any more, and nobody wanted that."""
        return self._failure is not None or (self._llm is not None and self._llm.errored)

    # ----------------------------------------------------------------------------------------------------- the end

    def shutdown(self) -> None:
        """End the engine, or its start; readers still waiting get an EngineDeadError. May be called twice."""
        with self._lock:
            self._is_closing = True
            llm, starting, watchdog = self._llm, self._starting, self._watchdog
        if watchdog is not None:
            watchdog.close()
        if llm is not None:
            llm.shutdown()
        elif starting is not None:
            starting.kill()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    async def __aenter__(self) -> EngineSupervisor:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    # ------------------------------------------------------------------------------------------------- the watched

    def num_steps(self) -> int | None:
        """See ``WatchedEngine``."""
        client = None if self._client is None else self._client.client
        return client.num_steps if isinstance(client, ZmqClient) else None

    def has_work(self) -> bool:
        """See ``WatchedEngine``."""
        return self.num_open > 0

    def pid(self) -> int | None:
        """See ``WatchedEngine``."""
        return self.engine_pid

    def _end_hung(self, reason: str) -> None:
        self._kill_reason = reason
        pid = self.engine_pid
        if pid is not None:
            end_group(pid)

    # -------------------------------------------------------------------------------------------- deaths and births

    def engine_died(self, cause: str, num_open: int) -> None:
        """See ``DeathListener``."""
        reason, self._kill_reason = self._kill_reason, None
        self.events.last_death = reason or cause
        self.events.num_replayed += num_open
        self._phase = "starting the engine process"
        first, rest = with_detail(self.events.last_death)
        logger.error("the engine has ended with %d requests open: %s", num_open, first, extra=rest)

    def engine_restarted(self, ready: EngineReady, gap_s: float, num_open: int) -> None:
        """See ``DeathListener``."""
        self.events.num_restarts += 1
        self.events.last_gap_s = gap_s
        logger.warning(
            "the engine is back after %.2f s (%.2f s of them its start) and goes on with %d requests",
            gap_s,
            ready.total_seconds,
            num_open,
        )

    def engine_ended(self, error: OctavoError) -> None:
        """See ``DeathListener``."""
        self._fail(error)

    def _start(self) -> None:
        """Body of a thread."""
        try:
            frontend = assemble(self._connect, self._options.log_stats, self._options.client_index)
        except Exception as error:  # border of the thread
            if self._is_closing:
                return
            if not isinstance(error, OctavoError):
                logger.exception("the engine could not be started")
            self._fail(error if isinstance(error, OctavoError) else EngineDeadError(f"{type(error).__name__}: {error}"))
            return
        llm = AsyncLLM(frontend)
        with self._lock:
            is_wanted = not self._is_closing
            if is_wanted:
                self._llm = llm
                self._watchdog = Watchdog(self, self._options.watch, self._end_hung)
        if not is_wanted:
            llm.shutdown()
        elif self._options.on_ready is not None:
            self._options.on_ready()

    def _connect(self, on_starting: OnStarting) -> EngineClient:
        first = LaunchListener(on_starting=on_starting, on_process=self._note_process)
        self._client = ReplayingClient(self._launch_and_tell, self._options.policy, self, first)
        return self._client

    def _launch_and_tell(self, listener: LaunchListener) -> EngineClient:
        def note_phase(phase: str) -> None:
            self._phase = phase
            if self._options.on_phase is not None:
                self._options.on_phase(phase)

        return self._launch(LaunchListener(listener.on_starting, note_phase, listener.on_process))

    def _note_process(self, process: Any) -> None:
        with self._lock:
            self._starting = process
            if self._is_closing:
                process.kill()

    def _fail(self, error: OctavoError) -> None:
        if "\n" in error.message:
            first, rest = with_detail(error.message)  # with its stack; whoever tells it to people cuts that off
            logger.error("%s", first, extra=rest)
        self._failure = error
        if self._options.on_failed is not None:
            self._options.on_failed(error)


def launcher(args: EngineArgs, build: str = BUILD) -> Launch:
    """What starts an engine in a child process, again and again.

    Args:
        args: What the user asked for.
        build: See ``launch_engine``.
    """
    return lambda listener: launch_engine(args, False, None, build, listener)

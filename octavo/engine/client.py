"""How a frontend talks to an engine, in this process or in another: one interface, two transports.

``InProcessClient`` steps the core inside ``recv``; ``ZmqClient`` polls a socket. Both are made by ``engine/launch.py``.
Requests and outputs are integers here; text is the frontend's. Never imports torch or the core itself.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol, cast

import msgspec
import zmq

from octavo import errors
from octavo.engine.heartbeat import Heartbeat
from octavo.engine.wire import Reader
from octavo.errors import EngineDeadError, OctavoError
from octavo.messages import (
    AbortRequests,
    CoreCall,
    CoreDead,
    CoreInput,
    CoreOutput,
    CoreResult,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    EngineSnapshot,
    EngineStarting,
)

CALL_TIMEOUT_S = 60.0
"""An administrative call waits for the step at hand, so this is far more than it can take."""
CLOSE_TIMEOUT_S = 5.0
"""How long a closing client waits for the engine process before it kills it."""
POLL_SLICE_S = 0.25
"""Longest uninterrupted wait: bounds how late a death without a word is seen."""
LAST_WORDS_MS = 250
"""How long the socket of a process that has ended must be silent before nothing more is expected."""
_RESULT_TYPES: dict[str, Any] = {"snapshot": EngineSnapshot}
"""Calls whose value is a struct; over a socket it arrives as a plain list."""


class ProcessHandle(Protocol):
    """What a client must know of an engine process that it may not own."""

    @property
    def pid(self) -> int: ...
    def wait(self, timeout: float | None = None) -> int: ...


class EngineClient(Protocol):
    """An engine as its frontend sees it.

    ``submit``, ``abort`` and ``call`` may be used from any thread; ``recv`` from one thread at a time. Each method
    raises EngineDeadError, with the cause, once the engine has ended.
    """

    @property
    def ready(self) -> EngineReady:
        """What the engine found when it started."""
        ...

    def submit(self, requests: list[EngineCoreRequest]) -> None:
        """Queue requests. A refusal comes back through ``recv`` as an output with FinishReason.ERROR."""
        ...

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> None:
        """End requests early. Each one still known is answered with a last output, FinishReason.ABORT.

        Args:
            request_ids: Whom to end.
            only_if_waiting: All or none of them: none if any of them has run already.
        """
        ...

    def recv(self, timeout_s: float | None) -> EngineCoreOutputs | None:
        """All outputs that have come and were not taken, those of several steps as of one, or None when there are none
        within ``timeout_s`` seconds (None = no limit).

        An engine in this process computes inside this call, and a step is not interrupted: it may return later.
        """
        ...

    def call(self, method: str, *args: Any) -> Any:
        """Run one of the core's administrative methods between two steps and return its result.

        Raises:
            OctavoError: The core refused the call.
        """
        ...

    def close(self) -> None:
        """End the engine. Requests still running get no further outputs. May be called twice."""
        ...


class SteppedCore(Protocol):
    """What InProcessClient needs of ``engine.core.EngineCore``."""

    def put(self, message: CoreInput, /) -> None: ...
    def run_once(self, timeout_s: float | None, /) -> None: ...
    def is_idle(self) -> bool: ...
    def shutdown(self) -> None: ...


Emit = Callable[[int, CoreOutput], None]


class _PumpedClient(ABC):
    """What both transports share: outputs waiting to be taken, calls waiting for their result, and the latched end.

    Whoever waits (``recv`` or ``call``) takes the pump lock and moves messages in; so a call works with and without
    another thread in ``recv``.

    Args:
        client_index: Which frontend of the engine this is.
    """

    def __init__(self, client_index: int = 0) -> None:
        self._client_index = client_index
        self._outputs: list[EngineCoreOutputs] = []
        self._calls: dict[int, Future[Any]] = {}
        self._next_call_id = 0
        self._call_lock = threading.Lock()
        self._pump_lock = threading.Lock()
        self._on_starting: Callable[[EngineStarting], None] | None = None
        self._death: str | None = None
        self._death_cause: BaseException | None = None

    @abstractmethod
    def _send(self, message: CoreInput) -> None: ...

    @abstractmethod
    def _pump(self, timeout_s: float) -> None:
        """Move what has arrived into ``_take``, waiting at most about ``timeout_s`` for it. The pump lock is held."""

    def submit(self, requests: list[EngineCoreRequest]) -> None:
        self._check_alive()
        for request in requests:
            self._send(request)

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> None:
        self._check_alive()
        if request_ids:
            self._send(AbortRequests(request_ids, only_if_waiting))

    def recv(self, timeout_s: float | None) -> EngineCoreOutputs | None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._pump_lock:
            while not self._outputs:
                self._check_alive()
                left_s = POLL_SLICE_S if deadline_s is None else deadline_s - time.monotonic()
                self._pump(max(0.0, min(left_s, POLL_SLICE_S)))
                if not self._outputs and deadline_s is not None and time.monotonic() >= deadline_s:
                    return None
            received, self._outputs = self._outputs, []
        return received[0] if len(received) == 1 else join_steps(received)

    def call(self, method: str, *args: Any) -> Any:
        self._check_alive()
        future: Future[Any] = Future()
        with self._call_lock:
            call_id = self._next_call_id
            self._next_call_id += 1
            self._calls[call_id] = future
        self._send(CoreCall(call_id, method, list(args), self._client_index))
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while not future.done():
            if time.monotonic() >= deadline_s:
                raise EngineDeadError(f"the engine has not answered {method!r} within {CALL_TIMEOUT_S:.0f} s")
            if self._pump_lock.acquire(timeout=0.01):
                try:
                    if not future.done():
                        self._check_alive()
                        self._pump(POLL_SLICE_S)
                finally:
                    self._pump_lock.release()
        result_type = _RESULT_TYPES.get(method)
        value = future.result()
        return value if result_type is None else msgspec.convert(value, result_type)

    def _take(self, message: CoreOutput) -> None:
        """File one message of the core."""
        if isinstance(message, EngineCoreOutputs):
            self._outputs.append(message)
        elif isinstance(message, CoreResult):
            future = self._calls.pop(message.call_id, None)
            if future is None:
                return
            if message.error is None:
                future.set_result(message.value)
            else:
                name, _, text = message.error.partition(": ")
                future.set_exception(make_error(name, text))
        elif isinstance(message, CoreDead):
            self._die(message.error)
        elif isinstance(message, EngineStarting) and self._on_starting is not None:
            self._on_starting(message)

    def _die(self, message: str, cause: BaseException | None = None) -> None:
        """Latch the first cause; everyone who waits or comes later gets it."""
        if self._death is None:
            self._death, self._death_cause = message, cause
        calls, self._calls = self._calls, {}
        for future in calls.values():
            future.set_exception(EngineDeadError(self._death))

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death) from self._death_cause


class InProcessClient(_PumpedClient):
    """The engine in this process: ``recv`` is what makes it work.

    Args:
        build: Makes the core around the ``emit`` that it is given, and tells what it found.
        on_starting: Called when the build has resolved its settings.
    """

    def __init__(
        self,
        build: Callable[[Emit], tuple[SteppedCore, EngineReady]],
        on_starting: Callable[[EngineStarting], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_starting = on_starting
        self._core, self._ready = build(lambda _client_index, message: self._take(message))
        self._is_closed = False

    @property
    def ready(self) -> EngineReady:
        return self._ready

    def _send(self, message: CoreInput) -> None:
        self._core.put(message)

    def _pump(self, timeout_s: float) -> None:
        try:
            self._core.run_once(timeout_s)
        except Exception as error:  # the border of the engine: its state is lost, whatever it was
            self._die(f"the engine failed: {type(error).__name__}: {error}", error)
            self._check_alive()
        except BaseException as error:  # an interrupt: harmless while resting, fatal in the middle of a step
            if not self._core.is_idle():
                self._die(f"a step of the engine was interrupted by {type(error).__name__}", error)
            raise

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._die("the engine was closed")
            self._core.put(CoreCall(-1, "ping"))  # wakes a thread that waits in recv
            with self._pump_lock:
                self._core.shutdown()


class ZmqClient(_PumpedClient):
    """The engine in a child process, over two ipc sockets.

    Args:
        process: A child, which is ended with the client; or one that belongs to another process, which is not.
        inbound: PUSH socket to the core.
        outbound: PULL socket from the core.
        death_fd: Read end of a pipe whose other end only the child holds: readable once the child is gone.
        ready: What the core reported when it was up.
        cleanup: Called once after the sockets are closed.
        steps: Counts the core's steps.
        client_index: Which frontend of the engine this is.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes] | ProcessHandle,
        inbound: zmq.Socket[bytes],
        outbound: zmq.Socket[bytes],
        death_fd: int,
        ready: EngineReady,
        cleanup: Callable[[], None],
        steps: Heartbeat,
        client_index: int = 0,
    ) -> None:
        super().__init__(client_index)
        self._steps = steps
        self._process = process
        self._inbound = inbound
        self._outbound = outbound
        self._death_fd = death_fd
        self._ready = ready
        self._is_closed = False
        # Also runs when the client is forgotten, and at the end of the program.
        self._child = cast("subprocess.Popen[bytes]", process) if isinstance(process, subprocess.Popen) else None
        self._release = weakref.finalize(self, _release, self._child, [inbound, outbound], death_fd, cleanup)
        self._send_lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._reader: Reader[CoreOutput] = Reader(CoreOutput, "an engine")
        self._poller = zmq.Poller()
        self._poller.register(outbound, zmq.POLLIN)
        self._poller.register(death_fd, zmq.POLLIN)

    @property
    def ready(self) -> EngineReady:
        return self._ready

    @property
    def process(self) -> ProcessHandle:
        """The engine process, to watch; ending it is ``close``'s work."""
        return self._process

    @property
    def num_steps(self) -> int:
        """Steps that the engine has finished; known even when it answers nobody."""
        return self._steps.read()

    @property
    def num_dropped_messages(self) -> int:
        """Messages so far that no engine sends."""
        return self._reader.num_dropped

    def _send(self, message: CoreInput) -> None:
        with self._send_lock:
            if self._is_closed:
                raise EngineDeadError("the engine was closed")
            self._inbound.send(self._encoder.encode(message))

    def _pump(self, timeout_s: float) -> None:
        events = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        self._read_all()
        if self._death_fd in events:
            # Its last words may still be on their way through ZeroMQ's thread.
            while self._outbound.poll(LAST_WORDS_MS):
                self._read_all()
            self._die(describe_exit(self._process))

    def _read_all(self) -> None:
        while True:
            try:
                data = self._outbound.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._reader.read(data)
            if message is not None:
                self._take(message)

    def close(self) -> None:
        with self._send_lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._die("the engine was closed")
        if self._child is not None:
            end_process(self._child)  # also wakes a thread that waits in recv
        with self._pump_lock:
            self._release()


def _release(
    child: subprocess.Popen[bytes] | None,
    sockets: list[zmq.Socket[bytes]],
    death_fd: int,
    cleanup: Callable[[], None],
) -> None:
    if child is not None:
        end_process(child)
    for socket in sockets:
        socket.close(linger=0)
    os.close(death_fd)
    cleanup()


def join_steps(steps: Iterable[EngineCoreOutputs]) -> EngineCoreOutputs:
    """The outputs of several steps as of one: who is behind does all further work once for all of them.

    Tokens that come with nothing else become one output of their request; any other output stays by itself, in order.
    """
    joined = EngineCoreOutputs([])
    growing: dict[str, EngineCoreOutput] = {}
    """The newest output of each request, where further tokens may join it."""
    for step in steps:
        joined.snapshot = step.snapshot or joined.snapshot
        for output in step.outputs:
            if output.finish_reason is None and output.logprobs is None and output.prompt_logprobs is None:
                before = growing.setdefault(output.request_id, output)
                if before is not output:
                    before.new_token_ids += output.new_token_ids
                    continue
            else:
                growing.pop(output.request_id, None)
            joined.outputs.append(output)
    return joined


def make_error(class_name: str, message: str) -> OctavoError:
    """An error of ``octavo.errors`` by name, as it was raised on the other side; OctavoError when there is none."""
    found = vars(errors).get(class_name)
    if isinstance(found, type) and issubclass(found, OctavoError) and found is not errors.CheckpointError:
        return found(message)
    return OctavoError(f"{class_name}: {message}")


def describe_exit(process: ProcessHandle) -> str:
    """A sentence on how an engine process ended, for one that did not say it itself."""
    try:
        code = process.wait(CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "the engine process closed its pipes but still runs"
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"the engine process was ended by signal {-code}{hint}"
    return f"the engine process ended with status {code}; its last words are on standard error"


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Close the child's stdin, which asks it to end; then insist."""
    if process.stdin is not None:
        process.stdin.close()
    for insist in (lambda: None, process.terminate, process.kill):
        insist()
        try:
            process.wait(CLOSE_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue

"""The process around an EngineCore: ``python -m octavo.engine.core_main``, started by ``engine/launch.py``.

Reads what to build from the first line of its standard input and then watches that input: when it closes, the parent
is gone or wants the engine to end. Requests come in over one ipc socket, outputs leave over one per frontend, each in
a thread of its own, so that the loop never waits for either. Messages are msgpack of the types in ``messages.py`` and
nothing else; bytes that are not are dropped and counted.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import msgspec
import zmq

from octavo.config.args import EngineArgs
from octavo.engine.core import EngineCore
from octavo.engine.heartbeat import DUMP_SIGNAL, Heartbeat
from octavo.engine.wire import Reader, make_socket
from octavo.errors import CheckpointError, OctavoError
from octavo.messages import (
    CoreDead,
    CoreInput,
    CoreOutput,
    EngineLoading,
    EngineReady,
    EngineStarting,
    StartupFailure,
)
from octavo.utils.logging import configure_logging

logger = logging.getLogger("octavo.engine.core_main")
FLUSH_MS = 2000
"""How long an ending engine tries to get its last messages out."""


class LaunchOrder(msgspec.Struct):
    """The first line of standard input, as JSON."""

    build: str
    """``module:function`` that takes (args, emit) and returns (EngineCore, EngineReady)."""
    args: msgspec.Raw
    inbound: str
    """ipc address that the core binds."""
    outbound: list[str]
    """One ipc address per frontend, bound there."""
    runtime_dir: str
    """Holds the sockets; removed at the end, here too in case the parent was killed."""
    death_fd: int
    """Write end of a pipe; held open, never written."""
    steps_path: str
    """Where to count steps; see ``heartbeat.py``."""
    log_level: str | None
    """As the parent configured its log; None where it left that to its user."""
    log_format: str = "text"


def resolve_build(path: str) -> tuple[type, Callable[..., tuple[EngineCore, EngineReady]]]:
    """The function behind ``module:function`` and the type of its first argument."""
    module_name, _, name = path.partition(":")
    build = getattr(import_module(module_name), name)
    return getattr(build, "args_type", EngineArgs), build


class Outbox:
    """Sends messages to the frontends from a thread of its own, in order."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], addresses: list[str]) -> None:
        self._queue: queue.SimpleQueue[tuple[int, CoreOutput] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._send_all, args=(context, addresses), name="octavo-outbox", daemon=True
        )
        self._thread.start()

    def emit(self, client_index: int, message: CoreOutput) -> None:
        self._queue.put((client_index, message))

    def close(self) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        self._thread.join()

    def _send_all(self, context: zmq.Context[zmq.Socket[bytes]], addresses: list[str]) -> None:
        encoder = msgspec.msgpack.Encoder()
        sockets = [make_socket(context, zmq.PUSH) for _ in addresses]
        for socket, address in zip(sockets, addresses, strict=True):
            socket.connect(address)
        while (item := self._queue.get()) is not None:
            client_index, message = item
            data = encoder.encode(message)
            is_news = isinstance(message, EngineLoading | EngineStarting)  # a build knows no frontends
            for socket in sockets if is_news else [sockets[client_index]]:
                socket.send(data)
        for socket in sockets:
            socket.close(linger=FLUSH_MS)


class Inlet:
    """Receives messages in a thread of its own and hands them to ``put``; ends with its context."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, put: Callable[[CoreInput], None]) -> None:
        self._reader: Reader[CoreInput] = Reader(CoreInput, "a client")
        self._put = put
        self._socket = make_socket(context, zmq.PULL)
        self._socket.bind(address)
        threading.Thread(target=self._receive_all, name="octavo-inlet", daemon=True).start()

    def _receive_all(self) -> None:
        while True:
            try:
                data = self._socket.recv()
            except zmq.ContextTerminated:
                self._socket.close(linger=0)
                return
            message = self._reader.read(data)
            if message is not None:
                self._put(message)

    def count_dropped(self) -> int:
        """Messages so far that no client sends."""
        return self._reader.num_dropped


def watch_parent(stop: Callable[[], None]) -> None:
    """Call ``stop`` once standard input is closed. Reads the descriptor itself: nothing else does by then."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=watch, name="octavo-parent-watch", daemon=True).start()


def describe_failure(error: BaseException) -> StartupFailure:
    """An error as a message, so that the parent can raise the same."""
    if isinstance(error, CheckpointError):
        return StartupFailure(
            "CheckpointError", error.message, file=error.file, tensor=error.tensor, reason=error.reason
        )
    if isinstance(error, OctavoError):
        return StartupFailure(type(error).__name__, error.message, param=error.param)
    text = "".join(traceback.format_exception(error))
    return StartupFailure("EngineDeadError", f"the engine could not start:\n{text}")


def read_order() -> LaunchOrder:
    """The first line of standard input, unbuffered so that the watcher sees every later byte and the end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(0, 65536)
        if not data:
            raise SystemExit(2)
        line += data
    return msgspec.json.decode(bytes(line), type=LaunchOrder)


def main() -> int:
    """Build, run until told to stop; 0 after a clean end, 1 after a failure."""
    order = read_order()
    os.set_inheritable(order.death_fd, False)
    if order.log_level is not None:
        configure_logging(order.log_level, log_format=order.log_format)
    # A watchdog asks for the stacks of a process that does not answer; this needs no interpreter that still runs.
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    is_stopping = threading.Event()
    running: list[EngineCore] = []

    def stop(*_: object) -> None:
        is_stopping.set()
        for core in running:
            core.stop()
        if not running:
            shutil.rmtree(order.runtime_dir, ignore_errors=True)
            os._exit(1)  # still loading: there is nothing to finish and no loop that would see the flag

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    watch_parent(stop)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Outbox(context, order.outbound)
    status = run_engine(order, context, outbox, running, is_stopping)
    outbox.close()
    context.term()
    shutil.rmtree(order.runtime_dir, ignore_errors=True)
    return status


def run_engine(
    order: LaunchOrder,
    context: zmq.Context[zmq.Socket[bytes]],
    outbox: Outbox,
    running: list[EngineCore],
    is_stopping: threading.Event,
) -> int:
    """Build the engine and loop. Whatever ends it is told to every frontend before the process goes."""
    everyone = range(len(order.outbound))
    # Two hundred thousand objects come with torch, and stay: looking for garbage among them finds next to none, now
    # and in later collections.
    gc.disable()
    try:
        args_type, build = resolve_build(order.build)
        core, ready = build(msgspec.json.decode(order.args, type=args_type), outbox.emit)
        inlet = Inlet(context, order.inbound, core.put)
        core.add_call("num_dropped_messages", inlet.count_dropped)
    except Exception as error:  # process border
        for client_index in everyone:
            outbox.emit(client_index, describe_failure(error))
        return 1
    core.attach(num_clients=len(order.outbound), on_step=Heartbeat(Path(order.steps_path)).beat)
    running.append(core)
    gc.freeze()
    gc.enable()
    for client_index in everyone:
        outbox.emit(client_index, ready)
    try:
        if not is_stopping.is_set():
            core.run()
        core.shutdown()
    except Exception as error:  # process border
        logger.exception("the engine failed")
        text = "".join(traceback.format_exception(error))
        for client_index in everyone:
            outbox.emit(client_index, CoreDead(f"the engine failed: {type(error).__name__}: {error}\n{text}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

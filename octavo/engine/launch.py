"""Start an engine, in this process or in a child, and return the client to it.

The engine's code is named by string and imported only where it runs: a frontend that uses a process stays without
torch. What is built is ``engine/build.py``'s matter, what the process does ``engine/core_main.py``'s. A process is
started in three parts, which one frontend does in a row and several share: addresses, a link per frontend, the child.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import zmq

from octavo.config.args import EngineArgs
from octavo.config.env import is_secret
from octavo.engine.client import (
    LAST_WORDS_MS,
    EngineClient,
    InProcessClient,
    ProcessHandle,
    ZmqClient,
    describe_exit,
    end_process,
    make_error,
)
from octavo.engine.heartbeat import Heartbeat
from octavo.engine.wire import Reader, make_socket
from octavo.errors import CheckpointError, EngineDeadError
from octavo.messages import CoreOutput, EngineLoading, EngineReady, EngineStarting, StartupFailure
from octavo.utils.logging import ROOT, configured_format

BUILD = "octavo.engine.build:build"
OnStarting = Callable[[EngineStarting], None]


@dataclass(frozen=True, slots=True)
class LaunchListener:
    """Who wants to hear of an engine that is starting. Called in the thread that starts it."""

    on_starting: OnStarting | None = None
    """The settings are resolved, weights come next."""
    on_phase: Callable[[str], None] | None = None
    """What the engine does now, in words."""
    on_process: Callable[[subprocess.Popen[bytes]], None] | None = None
    """The child runs: whoever does not want to wait for it any more may kill it."""


@dataclass(frozen=True, slots=True)
class EngineAddresses:
    """Where an engine process and its frontends meet."""

    runtime_dir: str
    """A folder of its own, which nobody else may enter."""
    inbound: str
    """Bound by the engine."""
    outbound: list[str]
    """One per frontend, bound there."""
    steps_path: str
    """The engine's ``Heartbeat``."""


def make_addresses(num_clients: int) -> EngineAddresses:
    """A fresh runtime folder with a heartbeat at zero."""
    runtime_dir = tempfile.mkdtemp(prefix="octavo-")  # mode 0700: nobody else reaches the sockets
    steps_path = str(Path(runtime_dir, "steps"))
    Heartbeat.create(Path(steps_path)).close()
    outbound = [f"ipc://{runtime_dir}/client-{index}" for index in range(num_clients)]
    return EngineAddresses(runtime_dir, f"ipc://{runtime_dir}/core", outbound, steps_path)


class Link:
    """One frontend's sockets to one engine process. To be opened before the process is started."""

    def __init__(self, addresses: EngineAddresses, client_index: int = 0) -> None:
        self.client_index = client_index
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.outbound = make_socket(self.context, zmq.PULL)
        self.inbound = make_socket(self.context, zmq.PUSH)
        self.outbound.bind(addresses.outbound[client_index])
        self.inbound.connect(addresses.inbound)

    def close(self) -> None:
        """For a link that no client has taken over."""
        for socket in (self.outbound, self.inbound):
            socket.close(linger=0)
        self.context.term()


def spawn_engine(addresses: EngineAddresses, args: Any, build: str = BUILD) -> tuple[subprocess.Popen[bytes], int]:
    """Start the engine process.

    Returns:
        The child, which ends when its stdin is closed; and a descriptor that becomes readable once it is gone.
    """
    death_fd, held_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo.engine.core_main"],
        stdin=subprocess.PIPE,
        pass_fds=(held_fd,),
        start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        env={name: value for name, value in os.environ.items() if not is_secret(name)},
    )
    os.close(held_fd)
    order = {
        "build": build,
        "args": args,
        "inbound": addresses.inbound,
        "outbound": addresses.outbound,
        "runtime_dir": addresses.runtime_dir,
        "death_fd": held_fd,
        "steps_path": addresses.steps_path,
        "log_level": _configured_level(),
        "log_format": configured_format(),
    }
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    except BaseException:
        end_process(process)
        os.close(death_fd)
        raise
    return process, death_fd


def launch_engine(
    args: EngineArgs,
    in_process: bool = True,
    on_starting: OnStarting | None = None,
    build: str = BUILD,
    listener: LaunchListener | None = None,
) -> EngineClient:
    """Start an engine and wait until it takes requests.

    Args:
        args: What the user asked for.
        in_process: Whether the engine lives in this process (its client steps it) or in a child.
        on_starting: Called once the settings are resolved, before weights are loaded, in this thread.
        build: ``module:function`` to build with instead of the real one, for tests.
        listener: Of a child: who else wants to hear of the start.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: As the engine raised them, wherever it runs.
        EngineDeadError: It could not start for another reason.
    """
    if in_process:
        module_name, _, name = build.partition(":")
        make = getattr(import_module(module_name), name)
        return InProcessClient(lambda emit: make(args, emit), on_starting)
    listener = listener or LaunchListener()

    def tell(message: EngineStarting) -> None:
        for each in (on_starting, listener.on_starting):
            if each is not None:
                each(message)

    return _launch_process(args, build, LaunchListener(tell, listener.on_phase, listener.on_process))


def _launch_process(args: Any, build: str, listener: LaunchListener) -> ZmqClient:
    addresses = make_addresses(1)
    try:
        link = Link(addresses)
        try:
            process, death_fd = spawn_engine(addresses, args, build)
            try:
                if listener.on_process is not None:
                    listener.on_process(process)
                return attach(addresses, link, process, death_fd, listener)
            except BaseException:
                end_process(process)
                os.close(death_fd)
                raise
        except BaseException:
            link.close()
            raise
    except BaseException:
        shutil.rmtree(addresses.runtime_dir, ignore_errors=True)
        raise


def attach(
    addresses: EngineAddresses,
    link: Link,
    process: ProcessHandle,
    death_fd: int,
    listener: LaunchListener,
    ready: EngineReady | None = None,
) -> ZmqClient:
    """Wait until a process that was started takes requests, and return the client to it, which owns all of these.

    Args:
        addresses: Where they meet. The folder is removed with the last frontend's client.
        link: This frontend's sockets.
        process: The engine.
        death_fd: See ``spawn_engine``.
        listener: Who wants to hear of the start.
        ready: What the engine reported, where that is known and it will not report again.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError, EngineDeadError: See ``launch_engine``; nothing is closed.
    """
    if ready is None:
        ready = _await_ready(process, link.outbound, death_fd, listener)

    def cleanup() -> None:
        link.context.term()
        if len(addresses.outbound) == 1:  # else whoever has started the engine removes it
            shutil.rmtree(addresses.runtime_dir, ignore_errors=True)

    steps = Heartbeat(Path(addresses.steps_path))
    return ZmqClient(process, link.inbound, link.outbound, death_fd, ready, cleanup, steps, link.client_index)


def _configured_level() -> str | None:
    """The level that ``configure_logging`` was called with in this process, None if it was not."""
    logger = logging.getLogger(ROOT)
    return logging.getLevelName(logger.level).lower() if logger.handlers else None


def _await_ready(
    process: ProcessHandle, outbound: zmq.Socket[bytes], death_fd: int, listener: LaunchListener
) -> EngineReady:
    reader: Reader[CoreOutput] = Reader(CoreOutput, "an engine")
    poller = zmq.Poller()
    poller.register(outbound, zmq.POLLIN)
    poller.register(death_fd, zmq.POLLIN)
    while True:
        events = dict(poller.poll())
        if outbound in events or outbound.poll(LAST_WORDS_MS if death_fd in events else 0):
            message = reader.read(outbound.recv())
            if isinstance(message, EngineReady):
                return message
            if isinstance(message, StartupFailure):
                if message.error_class == "CheckpointError":
                    raise CheckpointError(message.file or "", message.reason or message.message, tensor=message.tensor)
                error = make_error(message.error_class, message.message)
                error.param = message.param
                raise error
            if isinstance(message, EngineStarting) and listener.on_starting is not None:
                listener.on_starting(message)
            if isinstance(message, EngineLoading) and listener.on_phase is not None:
                listener.on_phase(message.phase)
        elif death_fd in events:
            raise EngineDeadError(f"the engine could not start: {describe_exit(process)}")

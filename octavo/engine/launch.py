"""Start an engine, in this process or in a child, and return the client to it.

The engine's code is named by string and imported only where it runs: a frontend that uses a process stays without
torch. What is built is ``engine/build.py``'s matter, what the process does ``engine/core_main.py``'s.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec
import zmq

from octavo.config.args import EngineArgs
from octavo.engine.client import (
    LAST_WORDS_MS,
    EngineClient,
    InProcessClient,
    ZmqClient,
    describe_exit,
    end_process,
    make_error,
)
from octavo.engine.wire import Reader, make_socket
from octavo.errors import CheckpointError, EngineDeadError
from octavo.messages import CoreOutput, EngineReady, EngineStarting, StartupFailure
from octavo.utils.logging import ROOT

BUILD = "octavo.engine.build:build"
OnStarting = Callable[[EngineStarting], None]


def launch_engine(
    args: EngineArgs,
    in_process: bool = True,
    on_starting: OnStarting | None = None,
    build: str = BUILD,
) -> EngineClient:
    """Start an engine and wait until it takes requests.

    Args:
        args: What the user asked for.
        in_process: Whether the engine lives in this process (its client steps it) or in a child.
        on_starting: Called once the settings are resolved, before weights are loaded, in this thread.
        build: ``module:function`` to build with instead of the real one, for tests.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: As the engine raised them, wherever it runs.
        EngineDeadError: It could not start for another reason.
    """
    if in_process:
        module_name, _, name = build.partition(":")
        make = getattr(import_module(module_name), name)
        return InProcessClient(lambda emit: make(args, emit), on_starting)
    return _launch_process(args, on_starting, build)


def _launch_process(args: Any, on_starting: OnStarting | None, build: str) -> ZmqClient:
    runtime_dir = tempfile.mkdtemp(prefix="octavo-")  # mode 0700: nobody else reaches the sockets
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbound = make_socket(context, zmq.PULL)
    inbound = make_socket(context, zmq.PUSH)
    inbound_address, outbound_address = f"ipc://{runtime_dir}/core", f"ipc://{runtime_dir}/client-0"
    outbound.bind(outbound_address)
    inbound.connect(inbound_address)
    death_fd, held_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo.engine.core_main"],
        stdin=subprocess.PIPE,
        pass_fds=(held_fd,),
        start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
    )
    os.close(held_fd)

    def cleanup() -> None:
        context.term()
        shutil.rmtree(runtime_dir, ignore_errors=True)

    try:
        order = {
            "build": build,
            "args": args,
            "inbound": inbound_address,
            "outbound": [outbound_address],
            "runtime_dir": runtime_dir,
            "death_fd": held_fd,
            "log_level": _configured_level(),
        }
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
        ready = _await_ready(process, outbound, death_fd, on_starting)
    except BaseException:
        end_process(process)
        for socket in (outbound, inbound):
            socket.close(linger=0)
        os.close(death_fd)
        cleanup()
        raise
    return ZmqClient(process, inbound, outbound, death_fd, ready, cleanup)


def _configured_level() -> str | None:
    """The level that ``configure_logging`` was called with in this process, None if it was not."""
    logger = logging.getLogger(ROOT)
    return logging.getLevelName(logger.level).lower() if logger.handlers else None


def _await_ready(
    process: subprocess.Popen[bytes], outbound: zmq.Socket[bytes], death_fd: int, on_starting: OnStarting | None
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
            if isinstance(message, EngineStarting) and on_starting is not None:
                on_starting(message)
        elif death_fd in events:
            raise EngineDeadError(f"the engine could not start: {describe_exit(process)}")

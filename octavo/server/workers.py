"""Several HTTP processes in front of one engine: the parent of them all, which serves nobody.

It owns the listening sockets, the engine process and the HTTP processes. When the engine ends it starts the next and
tells the workers, each of which replays its own requests; when a worker is killed, its requests are ended in the engine
and another takes its place. The rules of giving up are those of a single process (``engine/blame.py``): parent and
workers count the same deaths. A worker's side is ``worker_main.py``, what they say to each other ``control.py``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.blame import Blame, RestartPolicy
from octavo.engine.client import ZmqClient, end_process
from octavo.engine.heartbeat import DUMP_SIGNAL
from octavo.engine.launch import EngineAddresses, LaunchListener, Link, attach, make_addresses, spawn_engine
from octavo.engine.replay import RETRY_PAUSE_S
from octavo.errors import EngineDeadError, OctavoError
from octavo.server import listen
from octavo.server.control import MAX_PACKET_BYTES, READY_FILE, EngineGone, Farewell, NewEngine, tell
from octavo.server.lifecycle import EXIT_ENGINE_FAILED, first_line
from octavo.server.worker_main import WorkerOrder
from octavo.utils.logging import ROOT, configured_format

logger = logging.getLogger(__name__)
POLL_S = 0.1
SIGNAL_GAP_S = 0.3
"""Of two signals that come close together a busy process sees one: the second must not be lost."""
END_GRACE_S = 10.0
"""How long workers get to end after the first has failed."""
MIN_LIFE_S = 5.0
"""A worker that is killed sooner is not replaced: it would go on like that."""


@dataclass(slots=True)
class Worker:
    """One HTTP process."""

    index: int
    process: subprocess.Popen[bytes]
    connection: socket.socket
    started_s: float = field(default_factory=time.monotonic)


class EngineOwner:
    """Starts engine processes one after the other, in a thread, and tells all workers.

    Args:
        args: Of the engine.
        num_workers: Frontends; the parent is one more, to hear of the engine and to speak to it.
        policy: When to give up.
        announce: Sends a message, and a descriptor with it, to every worker.
    """

    def __init__(self, args: EngineArgs, num_workers: int, policy: RestartPolicy, announce: Announce) -> None:
        self._args = args
        self._num_workers = num_workers
        self._blame = Blame(policy)
        self._announce = announce
        self._life = 0
        self._is_closing = threading.Event()
        self._lock = threading.Lock()
        self._current: tuple[NewEngine, int] | None = None
        """The engine that runs or starts, and its death descriptor."""
        self._late: list[socket.socket] = []
        """Workers that came while an engine was starting."""
        self._process: subprocess.Popen[bytes] | None = None
        self._client: ZmqClient | None = None
        self.failure: OctavoError | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-engine-owner", daemon=True)
        self._thread.start()

    def introduce(self, connection: socket.socket) -> None:
        """Tell a new worker of the engine that there is: once it is ready, for its report may have gone to the worker
        before."""
        with self._lock:
            if self._current is not None and self._current[0].is_ready:
                tell(connection, *self._current)
            elif self._current is not None:
                self._late.append(connection)

    def forget_client(self, index: int) -> None:
        """A worker is gone: nobody waits for its requests any more."""
        client = self._client
        if client is not None:
            with contextlib.suppress(OctavoError):
                logger.warning("%d requests of HTTP process %d are ended", client.call("abort_client", index), index)

    def close(self) -> None:
        """End the engine."""
        self._is_closing.set()
        while self._thread.is_alive():  # another engine may just be on its way
            client, process = self._client, self._process
            if client is not None:
                client.close()
            elif process is not None:
                process.kill()
            self._thread.join(POLL_S)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            addresses = make_addresses(self._num_workers + 1)
            try:
                self._live(addresses)
            except OctavoError as error:
                if self._is_closing.is_set() or self._is_over(error):
                    return
            finally:
                shutil.rmtree(addresses.runtime_dir, ignore_errors=True)

    def _is_over(self, error: OctavoError) -> bool:
        is_first = self._life == 1 and self._client is None
        verdict = "the engine could not be started" if is_first else self._blame.count_death(time.monotonic())
        if verdict is not None:
            self.failure = error if is_first else EngineDeadError(f"{verdict}: {error.message}")
            return True
        if self._client is None:
            self._is_closing.wait(RETRY_PAUSE_S)  # it has not even started
        self._client = None
        return False

    def _live(self, addresses: EngineAddresses) -> None:
        """One engine, from its start to its end, which is an error."""
        link = Link(addresses, self._num_workers)
        process, death_fd = spawn_engine(addresses, self._args)
        self._process = process
        self._life += 1
        news = NewEngine(self._life, addresses, process.pid)
        with self._lock:
            self._late.clear()  # they hear of this one with all others
            self._current = (news, death_fd)
            self._announce(news, death_fd)
        try:
            client = attach(addresses, link, process, os.dup(death_fd), LaunchListener())
        except BaseException:
            end_process(process)
            link.close()
            raise
        else:
            self._client = client
            self._watch(client, addresses)
        finally:
            with self._lock:
                self._current = None
                self._announce(EngineGone(news.life, process.wait()), None)
            os.close(death_fd)

    def _watch(self, client: ZmqClient, addresses: EngineAddresses) -> None:
        part = Path(addresses.runtime_dir, READY_FILE + ".part")
        part.write_bytes(msgspec.msgpack.encode(client.ready))
        part.rename(part.with_name(READY_FILE))
        with self._lock:
            assert self._current is not None
            news, death_fd = self._current
            self._current = (msgspec.structs.replace(news, is_ready=True), death_fd)
            for connection in self._late:
                tell(connection, *self._current)
            self._late.clear()
        try:
            while True:
                client.recv(None)
        finally:
            client.close()


class Announce:
    """Sends to all workers, whoever they are by then."""

    def __init__(self) -> None:
        self.connections: dict[int, socket.socket] = {}

    def __call__(self, message: NewEngine | EngineGone, death_fd: int | None) -> None:
        """Those that are gone are passed over."""
        for connection in list(self.connections.values()):
            tell(connection, message, death_fd)


class Parent:
    """Keeps the workers.

    Args:
        args: Of the engine.
        config: Of the server.
        listeners: One per worker, or one for all.
    """

    def __init__(self, args: EngineArgs, config: ServerConfig, listeners: list[socket.socket]) -> None:
        self._args = args
        self._config = config
        self._listeners = listeners
        self._share_folder = tempfile.mkdtemp(prefix="octavo-http-")
        self._announce = Announce()
        self._num_signals = 0
        self._newest_signal = signal.SIGTERM.value
        self._num_passed_on, self._passed_on_s = 0, 0.0
        self.status = 0
        self.line: str | None = None
        """Why it failed, to be said last."""
        self._workers = {index: self._spawn(index) for index in range(config.api_server_count)}
        policy = RestartPolicy(max_deaths=config.max_engine_deaths)
        self._engine = EngineOwner(args, config.api_server_count, policy, self._announce)

    def run(self) -> None:
        """Until all workers have ended."""

        def on_signal(number: int, _frame: FrameType | None) -> None:
            self._num_signals += 1
            self._newest_signal = number

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        deadline_s: float | None = None
        try:
            while self._workers:
                time.sleep(POLL_S)
                for worker in [each for each in self._workers.values() if each.process.poll() is not None]:
                    self._bury(worker)
                self._pass_on_signals()
                if self.status and self._workers and not self._num_signals:
                    if deadline_s is None:
                        deadline_s = time.monotonic() + END_GRACE_S
                        self._send_all(signal.SIGTERM)
                    elif time.monotonic() > deadline_s:
                        self._send_all(signal.SIGKILL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._send_all(signal.SIGKILL)
            self._engine.close()
            shutil.rmtree(self._share_folder, ignore_errors=True)
        if self._engine.failure is not None and not self._num_signals:
            self.status = EXIT_ENGINE_FAILED
            self.line = first_line(self._engine.failure)

    def _pass_on_signals(self) -> None:
        if self._num_passed_on < min(self._num_signals, 2) and time.monotonic() > self._passed_on_s + SIGNAL_GAP_S:
            self._num_passed_on += 1
            self._passed_on_s = time.monotonic()
            self._send_all(self._newest_signal)

    def _send_all(self, number: int) -> None:
        for worker in self._workers.values():
            worker.process.send_signal(number)

    def _bury(self, worker: Worker) -> None:
        """A worker has ended: replace it if it was killed, follow it if it has failed."""
        status = worker.process.returncode
        del self._workers[worker.index], self._announce.connections[worker.index]
        self._hear(worker)
        worker.connection.close()
        if self._num_signals or self.status or status >= 0:
            self.status = self.status or max(status, 0)  # a signal that came too early to be caught is no failure
            return
        logger.error("HTTP process %d was ended by signal %d", worker.index, -status)
        self._engine.forget_client(worker.index)
        if time.monotonic() < worker.started_s + MIN_LIFE_S:
            self.status, self.line = 1, f"HTTP process {worker.index} was ended by signal {-status} again"
            return
        replacement = self._spawn(worker.index, is_replacement=True)
        self._workers[worker.index] = replacement
        self._engine.introduce(replacement.connection)

    def _hear(self, worker: Worker) -> None:
        """Its last words."""
        worker.connection.setblocking(False)
        with contextlib.suppress(OSError, msgspec.DecodeError):
            data = worker.connection.recv(MAX_PACKET_BYTES)
            if data:
                self.line = self.line or msgspec.json.decode(data, type=Farewell).line

    def _spawn(self, index: int, *, is_replacement: bool = False) -> Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = self._listeners[index % len(self._listeners)]
        process = subprocess.Popen(
            [sys.executable, "-m", "octavo.server.worker_main"],
            stdin=subprocess.PIPE,
            pass_fds=(theirs.fileno(), listener.fileno()),
            start_new_session=True,  # signals of the terminal are the parent's to pass on
        )
        order = WorkerOrder(
            config=self._config,
            index=index,
            count=self._config.api_server_count,
            share_folder=self._share_folder,
            listener_fd=listener.fileno(),
            control_fd=theirs.fileno(),
            is_replacement=is_replacement,
            log_stats=self._args.disable_log_stats is not True,
            log_level=logging.getLevelName(logging.getLogger(ROOT).getEffectiveLevel()).lower(),
            log_format=configured_format(),
        )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(msgspec.json.encode(order))
        theirs.close()
        self._announce.connections[index] = ours
        return Worker(index, process, ours)


def serve(args: EngineArgs, config: ServerConfig, prog: str) -> int:
    """Serve until a signal, or the end of the engine; see ``host.serve``.

    Args:
        args: Of the engine.
        config: Of the server; ``api_server_count`` is how many.
        prog: For the last line of a server that failed.

    Raises:
        ConfigError: The address cannot be had.
    """
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    listeners = listen.bind_several(config, config.api_server_count)
    try:
        parent = Parent(args, config, listeners)
        parent.run()
    finally:
        for listener in listeners:
            listener.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)
    if parent.line is not None:
        sys.stderr.write(f"{prog}: error: {parent.line}\n")
        sys.stderr.flush()
    return parent.status

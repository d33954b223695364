"""What the parent of several HTTP processes and each of them say to each other, over a pair of sockets.

Messages are JSON in packets that keep their borders; the descriptor that tells of the engine's death travels beside
one of them. Knows no engine but by address.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import threading
from pathlib import Path

import msgspec

from octavo.engine.client import EngineClient
from octavo.engine.launch import EngineAddresses, LaunchListener, Link, attach
from octavo.errors import EngineDeadError
from octavo.messages import EngineReady

MAX_PACKET_BYTES = 64 * 1024
READY_FILE = "ready"
"""In the runtime folder: what the engine reported, for frontends that come later."""


class NewEngine(msgspec.Struct, tag="engine"):
    """To a worker: an engine process was started. With its death descriptor."""

    life: int
    addresses: EngineAddresses
    pid: int
    is_ready: bool = False
    """It has reported long ago: the report is in READY_FILE."""


class EngineGone(msgspec.Struct, tag="gone"):
    """To a worker: how the engine process of that life ended."""

    life: int
    status: int


class Farewell(msgspec.Struct, tag="farewell"):
    """To the parent: why the worker ends."""

    line: str


ToWorker = NewEngine | EngineGone


class RemoteProcess:
    """An engine process that another process owns.

    Args:
        pid: Its id.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._gone = threading.Event()
        self._status = 0

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._pid

    def set_status(self, status: int) -> None:
        """The owner has told how it ended."""
        self._status = status
        self._gone.set()

    def wait(self, timeout: float | None = None) -> int:
        """Its status, once the owner has told.

        Raises:
            subprocess.TimeoutExpired: It has not within ``timeout`` seconds.
        """
        if not self._gone.wait(timeout):
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)
        return self._status


class WorkerEnd:
    """A worker's end of the sockets.

    Args:
        connection: To the parent.
        client_index: Which frontend of the engine this worker is.
    """

    def __init__(self, connection: socket.socket, client_index: int) -> None:
        self._connection = connection
        self._client_index = client_index
        self._engines: queue.SimpleQueue[tuple[NewEngine, int] | None] = queue.SimpleQueue()
        self._processes: dict[int, RemoteProcess] = {}
        self._decoder = msgspec.json.Decoder(ToWorker)
        self.is_parent_gone = threading.Event()

    def listen(self) -> None:
        """Read until the parent is gone; in a thread of its own."""
        while True:
            data, fds, _, _ = socket.recv_fds(self._connection, MAX_PACKET_BYTES, 1)
            if not data:
                break
            message = self._decoder.decode(data)
            if isinstance(message, NewEngine):
                self._processes[message.life] = RemoteProcess(message.pid)
                self._engines.put((message, fds[0]))
            elif message.life in self._processes:
                self._processes[message.life].set_status(message.status)
        self._engines.put(None)
        self.is_parent_gone.set()

    def launch(self, listener: LaunchListener) -> EngineClient:
        """A ``Launch``: waits for the parent to start the next engine, and for that to be ready.

        Raises:
            OctavoError: It could not start, or there will be none.
        """
        item = self._engines.get()
        if item is None:
            raise EngineDeadError("the parent process of this server is gone")
        message, death_fd = item
        link = Link(message.addresses, self._client_index)
        process = self._processes[message.life]
        try:
            ready = None
            if message.is_ready:
                data = Path(message.addresses.runtime_dir, READY_FILE).read_bytes()
                ready = msgspec.msgpack.decode(data, type=EngineReady)
            return attach(message.addresses, link, process, death_fd, listener, ready)
        except BaseException:
            link.close()
            socket.close(death_fd)
            raise

    def say(self, line: str) -> None:
        """Tell the parent why this worker ends."""
        try:
            self._connection.send(msgspec.json.encode(Farewell(line[:2000])))
        except OSError:
            return  # it knows


def tell(connection: socket.socket, message: ToWorker, death_fd: int | None = None) -> None:
    """From the parent to a worker; one that is gone is passed over."""
    try:
        socket.send_fds(connection, [msgspec.json.encode(message)], [] if death_fd is None else [death_fd])
    except OSError:
        return

"""One of several HTTP processes: ``python -m octavo.server.worker_main``, started by ``workers.py``.

The same server as a single one, but its engine belongs to the parent, and so does the listening socket.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading

import msgspec

from octavo.config.server import ServerConfig
from octavo.server.control import WorkerEnd
from octavo.server.host import Place, serve_here
from octavo.server.lifecycle import first_line
from octavo.utils.logging import configure_logging

logger = logging.getLogger("octavo.server.worker_main")


class WorkerOrder(msgspec.Struct):
    """All of standard input, as JSON."""

    config: ServerConfig
    index: int
    count: int
    share_folder: str
    listener_fd: int
    control_fd: int
    is_replacement: bool
    log_stats: bool
    log_level: str
    log_format: str


def main() -> int:
    """Serve until told to stop; the exit status."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerOrder)
    configure_logging(order.log_level, log_format=order.log_format)
    for fd in (order.listener_fd, order.control_fd):
        os.set_inheritable(fd, False)
    end = WorkerEnd(socket.socket(fileno=order.control_fd), order.index)

    def listen() -> None:
        end.listen()
        os.kill(os.getpid(), signal.SIGTERM)  # the parent is gone: finish what is open, and go too

    threading.Thread(target=listen, name="octavo-control", daemon=True).start()
    listener = socket.socket(fileno=order.listener_fd)
    place = Place(order.index, order.count, order.share_folder, order.is_replacement)
    lifecycle = serve_here(order.config, end.launch, listener, log_stats=order.log_stats, place=place)
    if lifecycle.failure is not None:
        end.say(first_line(lifecycle.failure))
    return lifecycle.status


if __name__ == "__main__":
    sys.exit(main())

"""What the system alone charges for a streamed token: a bare loop of ``send`` to as many loopback connections.

The cheapest program that writes once per token and stream pays this. On loopback a ``send`` also does the receiver's
work: its packet is received, acknowledged and its process woken within the call. To another machine it is cheaper.

    python benchmarks/server/send_floor.py --streams 200
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import selectors
import socket
import time

EVENT_BYTES = 256
"""About an event of a text completion with its framing."""


def read_all(port: int, count: int) -> None:
    """Body of the readers' process: until every connection is closed."""
    selector = selectors.DefaultSelector()
    for _ in range(count):
        selector.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            connection: socket.socket = key.fileobj  # type: ignore[assignment]
            if not connection.recv(65536):
                selector.unregister(connection)
                connection.close()


def measure(count: int, steps: int = 60, step_s: float = 0.02) -> dict[str, float]:
    """User and system time per ``send``, microseconds.

    Args:
        count: Connections.
        steps: How often to send to all of them.
        step_s: Pause between two steps.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    readers = multiprocessing.get_context("spawn").Process(target=read_all, args=(listener.getsockname()[1], count))
    readers.start()
    connections = [listener.accept()[0] for _ in range(count)]
    for each in connections:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        each.setblocking(False)
    data = b"x" * EVENT_BYTES
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        for each in connections:
            each.send(data)
        time.sleep(step_s)
    after = resource.getrusage(resource.RUSAGE_SELF)
    for each in (*connections, listener):
        each.close()
    readers.join()
    per_send = 1e6 / (count * steps)
    return {
        "floor_user_us": per_send * (after.ru_utime - before.ru_utime),
        "floor_system_us": per_send * (after.ru_stime - before.ru_stime),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    count = parser.parse_args().streams
    print(json.dumps({"send_floor": {"streams": count, **measure(count)}}))


if __name__ == "__main__":
    main()

"""Asks ``/health`` again and again until its standard input ends; then writes what it saw, as JSON, to its output.

    python benchmarks/server/probe.py PORT [INTERVAL_S]

Each question has a connection of its own, as a load balancer's has. Imports nothing of ours, so that it starts at once.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time


def ask(port: int, timeout_s: float) -> bool:
    """Whether the server is well."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(4096)[:16]
    except OSError:
        return False


def main() -> None:
    port, interval_s = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.1
    latencies_s: list[float] = []
    num_failed = 0
    while not select.select([sys.stdin], [], [], interval_s)[0]:
        begin_s = time.perf_counter()
        num_failed += not ask(port, 30.0)
        latencies_s.append(time.perf_counter() - begin_s)
    json.dump({"latencies_s": latencies_s, "num_failed": num_failed}, sys.stdout)


if __name__ == "__main__":
    main()

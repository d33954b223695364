"""Waits that end: each says what it waited for. The times are no measure of anything, only longer than any slow machine
needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

WAIT_S = 120.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> None:
    """Look again and again until ``condition`` holds.

    Raises:
        AssertionError: It never did.
    """
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"still not after {seconds:g} s: {what}"
        time.sleep(0.005)


def join(thread: threading.Thread, seconds: float = WAIT_S) -> None:
    """Wait for the end of a thread.

    Raises:
        AssertionError: It goes on.
    """
    thread.join(seconds)
    assert not thread.is_alive(), f"the thread {thread.name!r} has not ended after {seconds:g} s"


def stop_server(server: Any, thread: threading.Thread) -> None:
    """End a uvicorn server that runs in a thread; requests get some seconds to finish.

    Raises:
        AssertionError: It would not end by itself, and what it waited for.
    """
    server.should_exit = True
    thread.join(WAIT_S / 4)
    left = f"{len(server.server_state.connections)} connections, {list(server.server_state.tasks)}"
    if thread.is_alive():
        server.force_exit = True
        join(thread)
        raise AssertionError(f"the server did not end by itself: {left}")

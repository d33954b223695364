"""What uvicorn keeps for every connection, in a tenth of the memory.

Its own parts are made of the library's events and queues, each of which reserves 0.7 kB from the start; a connection
has three. These have the same methods. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Signal:
    """``asyncio.Event``, as far as uvicorn uses it, for few that wait."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[asyncio.Future[None]] | None = None

    def is_set(self) -> bool:
        """Whether ``set`` came last."""
        return self._is_set

    def set(self) -> None:
        """Wake all that wait; from now on nobody does."""
        self._is_set = True
        for waiter in self._waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Let those wait that come from now on."""
        self._is_set = False

    async def wait(self) -> bool:
        """Until ``set``."""
        if self._is_set:
            return True
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)
        return True


class Flow:
    """uvicorn's ``FlowControl``.

    Args:
        transport: Of the connection.
    """

    __slots__ = ("_transport", "_writable", "read_paused", "write_paused")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._writable = Signal()
        self._writable.set()
        self.read_paused = False
        self.write_paused = False

    async def drain(self) -> None:
        """Wait until the client has taken what was written."""
        await self._writable.wait()

    def pause_reading(self) -> None:
        """Let the client wait with what it sends."""
        if not self.read_paused:
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take what it sends."""
        if self.read_paused:
            self.read_paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """The client does not take what was written."""
        if not self.write_paused:
            self.write_paused = True
            self._writable.clear()

    def resume_writing(self) -> None:
        """It has."""
        if self.write_paused:
            self.write_paused = False
            self._writable.set()


class Pipeline(list[Any]):
    """What is asked of a connection's queue of requests; empty for nearly all of them."""

    __slots__ = ()

    def appendleft(self, item: Any) -> None:
        """Behind all others: ``pop`` takes them from the other end."""
        self.insert(0, item)

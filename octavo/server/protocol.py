"""Connections with limits: uvicorn's httptools protocol, which sets none before a request is parsed.

An ASGI application sees a request only when its head is complete. What must happen before is here: how long the head
may be and take, how many connections there may be, what is said to bytes that are no HTTP. Bodies are ``limits.py``'s.
The application does not depend on this module; another ASGI server can run it behind limits of its own.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from octavo.config.guard import GuardConfig
from octavo.server.admission import NO_ROOM
from octavo.server.connection_parts import Flow, Pipeline, Signal
from octavo.server.connection_writer import ConnectionWriter, extension_of
from octavo.server.openai_errors import HTTPRefusal, error_response
from octavo.server.start_gate import StartGate

logger = logging.getLogger(__name__)
MAX_PIPELINED = 1000
"""Requests of one connection that wait for the one before them."""
LINGER_S = 5.0
"""How long a client that was refused may go on sending its body, so that it gets to read why."""
LINGER_BYTES = 256 * 2**20
RESERVED_FILES = 128
"""Open files that are no client's."""
LOG_EVERY_S = 10.0
STREAM_BUFFER_BYTES = 128 * 1024
"""Of a stream's connection; Linux doubles it for its own needs. Enough for 1 MB/s to a client 100 ms away. With a
quarter of it a connection within one machine falls from 100 to 2 MB/s, as its packets are larger than that."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """See ``GuardConfig``."""

    max_connections: int
    max_header_bytes: int
    max_header_count: int
    header_timeout_s: float
    error_format: str = "openai"
    shows_request_ids: bool = True


def limits_of(config: GuardConfig, error_format: str = "openai", *, shows_request_ids: bool = True) -> ConnectionLimits:
    """The limits that a configuration means on this machine."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(1, files - RESERVED_FILES) if files != resource.RLIM_INFINITY else 2**31 - 1
    return ConnectionLimits(
        max_connections=most if config.max_connections is None else min(config.max_connections, most),
        max_header_bytes=config.max_header_bytes,
        max_header_count=config.max_header_count,
        header_timeout_s=config.header_timeout,
        error_format=error_format,
        shows_request_ids=shows_request_ids,
    )


class RareLog:
    """One line per ten seconds for what strangers can cause as often as they like."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._num_silent = 0

    def warn(self, message: str) -> None:
        """Log, or count."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._num_silent += 1
            return
        more = f" ({self._num_silent} more of the kind before)" if self._num_silent else ""
        logger.warning("%s%s", message, more)
        self._next_s, self._num_silent = now_s + LOG_EVERY_S, 0


class _RefusalError(Exception):
    """Out of a parser's callback: stop here."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Its limits are the class's; see ``make_protocol``."""

    limits: ConnectionLimits
    log: RareLog
    gate: StartGate
    is_full: Callable[[int], bool]
    """Whether there is no room for a request that stands behind so many others."""

    # Slots: with these as well, uvicorn's would be too many for a dict that shares its keys, 1.3 kB a connection.
    __slots__ = ("_is_in_head", "_linger", "_num_discarded", "_num_head_bytes", "_refusal", "_timer", "writer")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pipeline = cast("Any", Pipeline())
        self._refusal: HTTPRefusal | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._num_head_bytes = 0
        self._num_discarded = 0
        self.writer: ConnectionWriter | None = None
        """Of the request that is answered now, if its answer is written past ASGI."""

    # -------------------------------------------------------------------------------------------- connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = cast("Any", Flow(transport))
        if len(self.connections) > self.limits.max_connections:
            self.log.warn(f"a connection was refused: {self.limits.max_connections} are open")
            self._refuse(HTTPRefusal(503, "too many connections", "overloaded", headers={"retry-after": "1"}))
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)
        if self.writer is not None:
            self.writer.connection_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.writer is not None:
            self.writer.pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writer is not None:
            self.writer.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        try:
            self.parser.feed_data(data)  # pyright: ignore[reportOptionalMemberAccess] - there until it is lost
        except httptools.HttpParserUpgrade:
            self.log.warn("a client wants to speak another protocol over this connection, which is not possible")
        except httptools.HttpParserError as error:
            refusal = self._refusal or HTTPRefusal(400, "this is no valid HTTP/1.1 request", "invalid_request")
            self.log.warn(f"a request was refused: {refusal.message} ({type(error).__name__})")
            self._refuse(refusal)
            return
        if not self._is_in_head or self.transport.is_closing():
            return
        if self._num_head_bytes > self.limits.max_header_bytes:
            self._refuse(self._head_too_long())
        elif self._num_head_bytes and self._timer is None:
            self._arm()

    def bound_buffers(self) -> None:
        """Let this connection hold little that its client has not taken: for streams, which come slowly. Other answers
        have what the system finds good for the distance, up to some megabytes."""
        connection: socket.socket | None = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER_BYTES)

    # ------------------------------------------------------------------------------------------ parser's calls

    def on_message_begin(self) -> None:
        self._num_head_bytes = max(self._num_head_bytes, 1)
        self._num_discarded = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self.limits.max_header_count:
            self._refusal = HTTPRefusal(
                431, f"the request has more than {self.limits.max_header_count} headers", "headers_too_large"
            )
            raise _RefusalError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._refusal = self._head_too_long()
            raise _RefusalError
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = HTTPRefusal(
                429, f"more than {MAX_PIPELINED} requests wait on this connection", "too_many_pipelined"
            )
            raise _RefusalError
        self._is_in_head = False
        self._disarm()
        scope: Any = self.scope
        scope["extensions"] = extension_of(self)
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.message_event = cast("Any", Signal())

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > LINGER_BYTES:
                self.transport.close()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = True
        self._num_head_bytes = 0
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_in_head and not self.transport.is_closing():
            # Answered before its body was read: the rest is thrown away, for a while.
            self._linger = self.loop.call_later(LINGER_S, self.transport.close)

    # ------------------------------------------------------------------------------------------------- details

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # What may be long work waits for its turn; a health check does not wait behind it.
        start = super()._start_asgi_task
        if cycle.scope["method"] != "POST":
            start(cycle, app)
        elif self.is_full(self.gate.num_waiting):
            cast("Any", cycle.scope)["extensions"][NO_ROOM] = True
            start(cycle, app)
        else:
            self.gate.put(self.loop, functools.partial(start, cycle, app))

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle  # uvicorn declares it without the None that it is at first
        return cycle is not None and not cycle.response_complete

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.limits.header_timeout_s, self._on_head_timeout)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_head_timeout(self) -> None:
        self._timer = None
        if self._is_answering:
            self._arm()  # the next request dawdles, but an answer is still under way
        elif self._num_head_bytes:
            self._refuse(HTTPRefusal(408, "the head of the request did not arrive in time", "header_timeout"))
        else:
            self.transport.close()

    def _head_too_long(self) -> HTTPRefusal:
        return HTTPRefusal(
            431, f"the head of the request is longer than {self.limits.max_header_bytes} bytes", "headers_too_large"
        )

    def _refuse(self, refusal: HTTPRefusal) -> None:
        """Answer without the application, and close. While an answer is under way, only close."""
        if not self._is_answering:
            response = error_response(refusal, self.limits.error_format)
            lines = [STATUS_LINE[refusal.status]]
            lines += [b"%b: %b\r\n" % header for header in response.raw_headers]
            if self.limits.shows_request_ids:
                lines.append(b"x-request-id: %b\r\n" % os.urandom(16).hex().encode())
            self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", bytes(response.body)]))
        self._disarm()
        self.transport.close()


def make_protocol(
    limits: ConnectionLimits, is_full: Callable[[int], bool] = lambda _: False
) -> type[HttpToolsProtocol]:
    """A protocol class for ``uvicorn.Config(http=...)``.

    Args:
        limits: Of each connection.
        is_full: Whether there is no room for a request that stands behind so many others.
    """
    return type(
        "LimitedProtocol",
        (GuardedProtocol,),
        {"__slots__": (), "limits": limits, "log": RareLog(), "gate": StartGate(), "is_full": staticmethod(is_full)},
    )

"""A way from a stream of tokens straight to its connection: no task is woken and no ASGI message made per token.

The head of an answer goes out through ASGI, past all layers, and so does its end; what lies between may be written by a
``ConnectionWriter``, which the web server's protocol (``protocol.py``) puts into the scope's ``extensions``. It frames
the bytes as the head has announced them, and tells when to pause and when the client is gone. Other ASGI servers have
no such extension; whoever uses it must be able to do without. Knows no events.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "octavo.connection_writer"
"""Key in ``scope["extensions"]``."""


class ConnectionListener(Protocol):
    """Whoever writes. All calls come from the event loop."""

    def pause_writing(self) -> None:
        """What was written before waits for the client: no more until ``resume_writing``."""
        ...

    def resume_writing(self) -> None:
        """The client has taken what waited."""
        ...

    def client_gone(self) -> None:
        """Nobody reads any more. Called once."""
        ...


class WritingProtocol(Protocol):
    """The connection, as far as a writer knows it."""

    writer: ConnectionWriter | None
    """Whom to tell of pauses and of the end."""
    cycle: RequestResponseCycle
    """uvicorn's side of the newest request."""

    def bound_buffers(self) -> None:
        """Let the connection hold little that its client has not taken."""
        ...


class ConnectionWriter:
    """Writes to the client of one request.

    Args:
        protocol: The connection.
        cycle: uvicorn's side of the request.
    """

    __slots__ = ("_cycle", "_is_framed", "_is_gone", "_listener", "_protocol")

    def __init__(self, protocol: WritingProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._listener: ConnectionListener | None = None
        self._is_framed = True
        self._is_gone = False

    def listen(self, listener: ConnectionListener) -> None:
        """Tell ``listener`` of the connection from now on. The body of the request must have been read: nobody needs to
        wait in ``receive`` to hear of the client's leaving."""
        self._listener = listener
        self._protocol.writer = self
        self._cycle.flow.resume_reading()  # else the leaving would not be seen
        self._protocol.bound_buffers()
        if self._cycle.disconnected:
            self.connection_lost()

    def release(self) -> None:
        """Tell nobody any more."""
        self._listener = None
        if self._protocol.writer is self:
            self._protocol.writer = None

    def before_head(self) -> None:
        """To be called before ``http.response.start`` of an answer whose length is not known. Clients of HTTP/1.0 know
        no chunks: their answer ends with the connection."""
        if self._cycle.scope["http_version"] == "1.0":
            self._is_framed = False
            self._cycle.chunked_encoding = False

    def write(self, body: bytes) -> None:
        """Send a part of the body; ``http.response.start`` has been sent. Never waits: a listener that writes while it
        is paused fills memory. Without effect once the client is gone.

        Args:
            body: Not empty.
        """
        if not self._is_gone:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if self._is_framed else body)

    def before_end(self, num_bytes: int) -> None:
        """To be called before the last ``http.response.body``, which goes through ASGI.

        Args:
            num_bytes: Of its body.
        """
        if not self._is_framed:
            self._cycle.expected_content_length = num_bytes

    def abort(self) -> None:
        """Close the connection at once; what was written and not taken is thrown away."""
        self._cycle.transport.abort()

    @property
    def is_paused(self) -> bool:
        """Whether the client has not taken what was written before."""
        return self._cycle.flow.write_paused

    # ------------------------------------------------------------------------------------- called by the protocol

    def pause_writing(self) -> None:
        """The buffer is full."""
        if self._listener is not None:
            self._listener.pause_writing()

    def resume_writing(self) -> None:
        """The buffer has room."""
        if self._listener is not None:
            self._listener.resume_writing()

    def connection_lost(self) -> None:
        """The connection is closed."""
        self._is_gone = True
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.client_gone()


def extension_of(protocol: WritingProtocol) -> dict[str, Any]:
    """What a protocol puts into the ``extensions`` of a request's scope. It does not keep the connection alive."""
    return {EXTENSION: weakref.ref(protocol)}


def writer_of(scope: Mapping[str, Any]) -> ConnectionWriter | None:
    """A writer for a request; None where the web server knows of none, and for a request that was sent together with
    others on one connection, whose newest may be another."""
    extensions: dict[str, Any] | None = scope.get("extensions")
    found = None if extensions is None else extensions.get(EXTENSION)
    protocol: WritingProtocol | None = None if found is None else found()
    if protocol is None or protocol.cycle.scope.get("extensions") is not extensions:
        return None
    return ConnectionWriter(protocol, protocol.cycle)

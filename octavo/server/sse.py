"""Server-sent events: chunks from byte templates, and the response that sends them.

A stream costs two tasks and no buffer of its own: while a reader does not take what was sent, its outputs are joined
into one at the engine's side (``AsyncLLM``), and a reader that takes nothing for too long is cut off. Errors before the
first chunk keep their HTTP status; later ones become an event. Knows no field of OpenAI's chunks but the outermost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import EngineDeadError
from octavo.server.deadline import Deadline
from octavo.server.openai_errors import error_body, error_response

logger = logging.getLogger(__name__)
Events = AsyncGenerator[bytes, None]
DIRECT_SEND = "direct_send"
"""Where in a scope's state a stream finds the way out that leaves aside all layers that look only at how an answer
begins: each of them would cost every chunk as much as making it. Put there by ``request_ids.py``."""
DONE = b"data: [DONE]\n\n"
HEADERS_AFTER_S = 5.0
"""A request that waits longer for its first token gets its headers, and a comment now and then, so that no proxy gives
up on it. Until then an error has an HTTP status of its own."""
COMMENT_INTERVAL_S = 10.0
MAX_PENDING_BYTES = 1 << 20
"""What may wait for a reader that takes nothing; looked at once a second, so it can be as much more as comes in one."""
encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
"""JSON of anything plain."""


class ChunkTemplate:
    """The unchanging bytes around what a chunk carries.

    Args:
        head: Fields of every chunk, before ``choices``.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self.open = b"data: " + encode(head)[:-1] + b',"choices":['

    def chunk(self, choices: bytes, tail: bytes = b"") -> bytes:
        """One event.

        Args:
            choices: JSON of the choices, joined by commas.
            tail: Further fields, each with a comma in front.
        """
        return b"%b%b]%b}\n\n" % (self.open, choices, tail)


class StallGuard:
    """Cuts off readers that take nothing from their streams. One timer for all of them.

    Args:
        timeout_s: How long a reader may take nothing.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._streams: set[EventStream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, stream: EventStream) -> None:
        """From now on."""
        self._streams.add(stream)
        if self._timer is None:
            self._arm()

    def release(self, stream: EventStream) -> None:
        """No longer."""
        self._streams.discard(stream)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(min(1.0, self._timeout_s / 4), self._look)

    def _look(self) -> None:
        self._timer = None
        latest = time.monotonic() - self._timeout_s
        for stream in [each for each in self._streams if each.sending_since_s]:
            if stream.sending_since_s < latest:
                logger.warning("a reader took nothing for %g s and is cut off", self._timeout_s)
                stream.cut_off()
            elif stream.pending_bytes > MAX_PENDING_BYTES:
                logger.warning(
                    "more than %d bytes wait for a reader that takes nothing; it is cut off", MAX_PENDING_BYTES
                )
                stream.cut_off()
        if self._streams:
            self._arm()


class Streamed(Protocol):
    """What a stream is a stream of."""

    def deadline(self) -> Deadline:
        """From now."""
        ...

    def close(self) -> None:
        """Give everything back; may have happened already."""
        ...

    @property
    def pending_bytes(self) -> int:
        """About how much waits for the reader at the engine's side."""
        ...


class EventStream(Response):
    """An ASGI response that sends events as they come.

    Args:
        events: The bytes; closed in the end, whatever happens.
        generation: Whose they are; likewise.
        guard: Against readers that do not read.
        error_format: See ``openai_errors``.
    """

    def __init__(
        self, events: Events, generation: Streamed, guard: StallGuard, *, error_format: str = "openai"
    ) -> None:  # fmt: skip
        super().__init__()
        self._events = events
        self._generation = generation
        self._deadline = generation.deadline()
        self._guard = guard
        self._error_format = error_format
        self._has_begun = False
        self._writer: asyncio.Task[None] | None = None
        self.sending_since_s = 0.0
        """``time.monotonic()`` of the send at hand; 0.0 while the stream waits for tokens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it. Returns when all is sent, or the client is gone."""
        self._writer = asyncio.create_task(self._write(scope, receive, send))
        watcher = asyncio.create_task(_until_gone(receive))
        self._guard.watch(self)
        try:
            await asyncio.wait((self._writer, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._guard.release(self)
            watcher.cancel()
            self._writer.cancel()
            with suppress(asyncio.CancelledError):
                await self._writer
            self._generation.close()  # where the events never began, nobody else does

    @property
    def pending_bytes(self) -> int:
        """See ``Streamed``."""
        return self._generation.pending_bytes

    def cut_off(self) -> None:
        """Stop sending; what the engine does for this stream ends."""
        if self._writer is not None:
            self._writer.cancel()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                state: Any = scope.get("state") or {}
                async with self._deadline.scope():
                    await self._write_all(send, state.get(DIRECT_SEND, send))
            except TimeoutError:
                raise self._deadline.error() from None
        except Exception as error:  # border of the response: the client must hear of it
            if isinstance(error, EngineDeadError) or not hasattr(error, "status"):
                logger.error("a stream failed", exc_info=error)
            if not self._has_begun:
                await error_response(error, self._error_format)(scope, receive, send)
            else:
                event = b"data: " + encode(error_body(error, self._error_format)) + b"\n\n" + DONE
                await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            await self._events.aclose()

    async def _write_all(self, send: Send, direct_send: Send) -> None:
        event = await self._first(send)
        if not self._has_begun:
            await self._begin(send)
        clock = time.monotonic
        if event is not None:
            await direct_send({"type": "http.response.body", "body": event, "more_body": True})
            async for event in self._events:
                self.sending_since_s = clock()
                await direct_send({"type": "http.response.body", "body": event, "more_body": True})
                self.sending_since_s = 0.0
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _first(self, send: Send) -> bytes | None:
        """The first event, and signs of life until it comes."""
        coming = asyncio.ensure_future(anext(self._events, None))
        try:
            wait_s = HEADERS_AFTER_S
            while not (await asyncio.wait((coming,), timeout=wait_s))[0]:
                if not self._has_begun:
                    await self._begin(send)
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                wait_s = COMMENT_INTERVAL_S
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await coming

    async def _begin(self, send: Send) -> None:
        self._has_begun = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold chunks back
        }
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """``work``'s result; it is cancelled when the client goes first.

    Args:
        receive: Of the request, whose body has been read.
        work: What the client waits for.

    Raises:
        ClientGoneError: It went.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

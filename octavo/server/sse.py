"""Server-sent events: chunks from byte templates, and the response that sends them.

A stream has no task and no buffer of its own: outputs are written by the call that brings them, and while a reader
does not take what was sent, they are joined at the engine's side (``engine/output_stream.py``). A reader that takes
nothing for too long is cut off. Errors before the first chunk keep their HTTP status; later ones become an event. Knows
no field of OpenAI's chunks but the outermost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.engine.output_stream import OutputSink
from octavo.errors import EngineDeadError
from octavo.outputs import RequestOutput
from octavo.server.connection_writer import ConnectionWriter, writer_of
from octavo.server.deadline import Deadline
from octavo.server.openai_errors import error_body, error_response

logger = logging.getLogger(__name__)
DIRECT_SEND = "direct_send"
"""Where in a scope's state a stream finds the way out that leaves aside all layers that look only at how an answer
begins: each of them would cost every chunk as much as making it. Put there by ``request_ids.py``."""
DONE = b"data: [DONE]\n\n"
HEADERS_AFTER_S = 5.0
"""A request that waits longer for its first token gets its headers, and a comment now and then, so that no proxy gives
up on it. Until then an error has an HTTP status of its own."""
COMMENT_INTERVAL_S = 10.0
MAX_PENDING_BYTES = 1 << 19
"""What may wait for a reader that takes nothing; looked at once a second, so it can be as much more as comes in one.
With what the connection holds (``protocol.py``) a stream stays below 1 MiB."""
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
        return b"".join((self.open, choices, b"]", tail, b"}\n\n"))


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
    """What a stream is a stream of: ``Generation``."""

    def deadline(self) -> Deadline:
        """From now."""
        ...

    async def start(self) -> None:
        """Begin."""
        ...

    async def next(self) -> list[RequestOutput]:
        """Wait for outputs. Cancelling loses nothing."""
        ...

    def attach(self, sink: OutputSink[RequestOutput], *, is_paused: bool) -> None:
        """Call ``sink`` with further outputs."""
        ...

    def note(self, outputs: Sequence[RequestOutput]) -> bool:
        """Is told by a sink of all that it gets; whether nothing more will come."""
        ...

    def pause(self) -> None:
        """Join outputs until ``resume``."""
        ...

    def resume(self) -> None:
        """Call the sink again."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Give everything back; may have happened already."""
        ...

    @property
    def num_open(self) -> int:
        """0 once the last output was taken."""
        ...

    @property
    def pending_bytes(self) -> int:
        """About how much waits for the reader at the engine's side."""
        ...


class Events(Protocol):
    """Makes the bytes of a stream."""

    def of(self, outputs: Sequence[RequestOutput], /) -> bytes:
        """Events that show what is new, one after the other; empty where there is nothing to show yet."""
        ...

    def ending(self) -> bytes:
        """Events after the last output."""
        ...


class EventStream(Response):
    """An ASGI response that sends events as they come.

    Its head and its end go through ASGI. What lies between is written straight to the connection, by the call that
    brings the outputs, where the web server offers that; otherwise this waits for outputs and sends them through ASGI.

    Args:
        events: Makes the bytes.
        generation: What they tell of; closed in the end, whatever happens.
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
        self._has_left = False
        self._task: asyncio.Task[Any] | None = None
        self._writer: ConnectionWriter | None = None
        self._last: asyncio.Future[bytes] | None = None
        """Events of the last outputs, of a stream that is written directly."""
        self.sending_since_s = 0.0
        """``time.monotonic()`` since when the reader takes nothing; 0.0 while the stream waits for tokens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it. Returns when all is sent, or the client is gone."""
        watcher = None
        self._writer = writer_of(scope)
        if self._writer is None:
            watcher = asyncio.create_task(self._watch(receive))
        else:
            self._writer.listen(self)
        self._guard.watch(self)
        self._task = task = asyncio.current_task()
        assert task is not None, "runs in a task"
        try:
            if not self._has_left:
                await self._write(scope, receive, send)
        except asyncio.CancelledError as error:
            self._generation.close(error)
            if not self._has_left:
                raise
            task.uncancel()
        finally:
            self._task = None
            self._guard.release(self)
            if watcher is not None:
                watcher.cancel()
            if self._writer is not None:
                self._writer.release()
            self._generation.close()

    @property
    def pending_bytes(self) -> int:
        """See ``Streamed``."""
        return self._generation.pending_bytes

    def cut_off(self) -> None:
        """Stop sending, and close the connection; what the engine does for this stream ends."""
        if self._writer is not None:
            self._writer.abort()
        self.client_gone()

    # -------------------------------------------------------------------------------- called by the connection

    def pause_writing(self) -> None:
        """See ``ConnectionListener``."""
        self.sending_since_s = time.monotonic()
        self._generation.pause()

    def resume_writing(self) -> None:
        """See ``ConnectionListener``."""
        self.sending_since_s = 0.0
        self._generation.resume()

    def client_gone(self) -> None:
        """See ``ConnectionListener``."""
        if not self._has_left:
            self._has_left = True
            if self._task is not None:
                self._task.cancel()

    # --------------------------------------------------------------------------- called when outputs have come

    def outputs_came(self, outputs: Sequence[RequestOutput]) -> None:
        """See ``OutputSink``."""
        assert self._last is not None and self._writer is not None, "attached by _write_directly"
        if self._last.done():
            return
        try:
            is_last = self._generation.note(outputs)
            event = self._events.of(outputs)
        except Exception as error:  # border of the response, as in _write: the client must hear of it
            self.failed(error)
            return
        if is_last:
            self._last.set_result(event)
        elif event:
            self._writer.write(event)

    def failed(self, error: BaseException) -> None:
        """See ``OutputSink``."""
        assert self._last is not None, "attached by _write_directly"
        if not self._last.done():
            self._last.set_exception(error)

    # ---------------------------------------------------------------------------------------------------- details

    async def _watch(self, receive: Receive) -> None:
        await _until_gone(receive)
        self.client_gone()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                async with self._deadline.scope():
                    await self._write_all(scope, send)
            except TimeoutError:
                raise self._deadline.error() from None
        except Exception as error:  # border of the response: the client must hear of it
            if isinstance(error, EngineDeadError) or not hasattr(error, "status"):
                logger.error("a stream failed", exc_info=error)
            self._generation.close(error)
            if not self._has_begun:
                await error_response(error, self._error_format)(scope, receive, send)
            else:
                await self._end(send, b"data: " + encode(error_body(error, self._error_format)) + b"\n\n")

    async def _write_all(self, scope: Scope, send: Send) -> None:
        await self._generation.start()
        outputs = await self._first(send)
        if not self._has_begun:
            await self._begin(send)
        state: Any = scope.get("state") or {}
        if self._writer is None:
            last = await self._write_through(state.get(DIRECT_SEND, send), outputs)
        else:
            last = await self._write_directly(self._writer, outputs)
        await self._end(send, last + self._events.ending())

    async def _write_through(self, send: Send, outputs: Sequence[RequestOutput]) -> bytes:
        """Send all but the last events through ASGI, and return those."""
        event = self._events.of(outputs)
        while self._generation.num_open:
            if event:
                await self._send(send, event)
            event = self._events.of(await self._generation.next())
        return event

    async def _write_directly(self, writer: ConnectionWriter, outputs: Sequence[RequestOutput]) -> bytes:
        """Let all but the last events be written as they come, and return those."""
        event = self._events.of(outputs)
        if not self._generation.num_open:
            return event
        if event:
            writer.write(event)
        self._last = asyncio.get_running_loop().create_future()
        self._generation.attach(self, is_paused=writer.is_paused)
        return await self._last

    async def _first(self, send: Send) -> list[RequestOutput]:
        """The first outputs, and signs of life until they come."""
        wait_s = HEADERS_AFTER_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    return await self._generation.next()
            except TimeoutError:
                if not self._has_begun:
                    await self._begin(send)
                await self._send(send, b": waiting\n\n")
                wait_s = COMMENT_INTERVAL_S

    async def _begin(self, send: Send) -> None:
        self._has_begun = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold chunks back
        }
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if self._writer is not None:
            self._writer.before_head()
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _end(self, send: Send, events: bytes) -> None:
        """Send the last events and what ends every stream."""
        events += DONE
        if self._writer is not None:
            self._writer.before_end(len(events))
        await self._send(send, events, is_last=True)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        if self._writer is not None and not is_last:
            self._writer.write(body)
            return
        self.sending_since_s = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})
        self.sending_since_s = 0.0


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

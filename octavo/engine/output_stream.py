"""How outputs get from the thread that makes them to whoever reads them: one reader's stream, one event loop's mail.

A stream keeps at most one output per request that its reader has not taken: what comes later is joined to it, so that a
slow reader costs little memory and holds nobody up. A reader either waits (``get``) or is called (``attach``), which
saves waking a task for every token. Knows no engine and no text.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from octavo.engine.frontend import AnyOutput
from octavo.outputs import RequestOutput
from octavo.pooling_outputs import PoolingRequestOutput

TOLD_PER_TURN = 64
"""Readers that are told in one turn of the event loop. What a step gave thousands of them would hold up for as long as
all of it takes whatever else the loop has to do."""
Out = TypeVar("Out", RequestOutput, PoolingRequestOutput)
OutIn = TypeVar("OutIn", RequestOutput, PoolingRequestOutput, contravariant=True)


class OutputSink(Protocol[OutIn]):
    """A reader that is called by its event loop. Neither method may raise."""

    def outputs_came(self, outputs: Sequence[OutIn], /) -> None:
        """What is new: at most one output per request."""
        ...

    def failed(self, error: BaseException, /) -> None:
        """Nothing more will come, and this is why. Called at most once."""
        ...


class OutputStream(Generic[Out]):
    """The outputs of one reader's requests. Touched by the reader's event loop only.

    Args:
        request_ids: Whose outputs come here.
        mailroom: Of the reader's event loop.
        on_close: Called with the stream when its reader leaves before the end.
        is_delta: Whether outputs are joined, or else the newer replaces the older.
    """

    __slots__ = (
        "_error", "_is_delta", "_is_paused", "_on_close", "_sink", "_waiter", "_waiting", "mailroom", "num_open",
        "request_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_ids: Sequence[str],
        mailroom: Mailroom,
        on_close: Callable[[OutputStream[Any]], None],
        *,
        is_delta: bool = False,
    ) -> None:
        self.request_ids = request_ids
        self.mailroom = mailroom
        self.num_open = len(request_ids)
        """Requests whose last output the reader has not taken."""
        self._on_close = on_close
        self._is_delta = is_delta
        self._waiting: dict[str, Out] = {}
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        """Of the reader, while it waits. A bare future: one wake-up per token is worth it."""
        self._sink: OutputSink[Out] | None = None
        self._is_paused = False

    async def get(self) -> list[Out]:
        """What the reader has not taken yet, in the order of arrival, at most one output per request; waits for it.
        Cancelling loses nothing.

        Raises:
            OctavoError: A request was refused, or the engine has ended.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._waiter = self.mailroom.loop.create_future()
            await self._waiter
        return self._take()

    def attach(self, sink: OutputSink[Out], *, is_paused: bool) -> None:
        """Call ``sink`` from now on, at once with what waits; ``get`` is no longer for use.

        Args:
            sink: Whom.
            is_paused: Whether not before ``resume``.
        """
        self._sink, self._is_paused = sink, is_paused
        self.flush()

    def pause(self) -> None:
        """Join what comes until ``resume``."""
        self._is_paused = True

    def resume(self) -> None:
        """Give the sink what has come meanwhile, and call it again."""
        self._is_paused = False
        self.flush()

    def close(self) -> None:
        """The reader wants nothing more: requests that are not finished are aborted. May be called twice."""
        self._sink = None
        if self.num_open:
            self.num_open = 0
            self._on_close(self)

    @property
    def waiting(self) -> Sequence[Out]:
        """What the reader has not taken."""
        return list(self._waiting.values())

    # --------------------------------------------------------------------------------------- called by the mailroom

    def hold(self, item: Out | BaseException) -> bool:
        """Keep an output for the reader; whether it has to be told by ``flush``."""
        if isinstance(item, BaseException):
            self._error = item
            return True
        waiting, request_id = self._waiting, item.request_id
        older = waiting.get(request_id)
        if older is None:
            waiting[request_id] = item
            return len(waiting) == 1
        assert isinstance(older, RequestOutput) and isinstance(item, RequestOutput), "one answer per text"
        older.add(item, delta=self._is_delta)  # the reader fell behind
        return False

    def flush(self) -> None:
        """Tell the reader."""
        sink = self._sink
        if sink is None:
            waiter, self._waiter = self._waiter, None
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        elif not self._is_paused:
            if self._waiting:
                sink.outputs_came(self._take())
            if self._error is not None:
                error, self._error = self._error, None
                sink.failed(error)

    def _take(self) -> list[Out]:
        outputs = list(self._waiting.values())
        self._waiting.clear()
        for output in outputs:
            if output.finished:
                self.num_open -= 1
        return outputs


Mail = tuple[OutputStream[Any], AnyOutput | BaseException]


class Mailroom:
    """Where other threads leave outputs for the streams of one event loop. A loop that is behind finds several for a
    stream, and the stream's reader gets them as one.

    Args:
        loop: Whose.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._told = threading.Condition(self._lock)
        self._is_told = True
        """Whether all readers have been told of all that was posted,"""
        self.told_s = 0.0
        """and when (``time.monotonic()``) that was so last."""
        self._mail: list[Mail] = []
        self._untold: deque[OutputStream[Any]] = deque()
        """Streams that hold what their readers have not been told of."""

    def post(self, mail: list[Mail]) -> None:
        """Leave outputs, from any thread.

        Raises:
            RuntimeError: The loop was closed.
        """
        with self._lock:
            is_first = not self._mail
            self._mail += mail
            self._is_told = False
        if is_first:
            self.loop.call_soon_threadsafe(self._deliver)

    def wait_until_told(self, timeout_s: float) -> None:
        """Wait, in another thread, until all readers have been told of what was posted.

        Args:
            timeout_s: At most so long.
        """
        if not self._is_told:  # a look without the lock: most often there is nothing to wait for
            with self._told:
                self._told.wait_for(lambda: self._is_told, timeout_s)

    def _deliver(self) -> None:
        with self._lock:
            mail, self._mail = self._mail, []
        is_telling = bool(self._untold)
        self._untold.extend(stream for stream, item in mail if stream.hold(item))
        if not is_telling:
            self._tell()

    def _tell(self) -> None:
        try:
            for _ in range(min(TOLD_PER_TURN, len(self._untold))):
                self._untold.popleft().flush()
        finally:
            if self._untold:
                self.loop.call_soon(self._tell)
            else:
                with self._told:
                    if not self._mail:
                        self._is_told, self.told_s = True, time.monotonic()
                        self._told.notify_all()

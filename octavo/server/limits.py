"""The outermost layers of the application: how long a body may be and take, and room for the request before any route.

Pure ASGI, knows no route but through ``paths.py``, and no web server. Heads are ``protocol.py``'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

from octavo.config.guard import GuardConfig
from octavo.errors import OctavoError
from octavo.server.admission import NO_ROOM, Admission
from octavo.server.openai_errors import HTTPRefusal, error_response
from octavo.server.paths import is_counted, routed_path

DRAIN_S = 5.0
"""How long a client that is answered before its body was read may go on sending, so that it gets to read the answer."""
DRAIN_BYTES = 256 * 2**20


class BodyLimits:
    """ASGI layer: bounds bodies in bytes and time.

    A client whose body was not wanted still sends it, and would see a broken connection instead of the answer: the end
    of the answer waits until the body is through, within limits.

    Args:
        app: What is behind.
        config: Sizes and times.
        error_format: Of error bodies.
    """

    def __init__(self, app: Any, config: GuardConfig, *, error_format: str = "openai") -> None:
        self._app = app
        self._config = config
        self._error_format = error_format

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = BoundedBody(receive, self._config.max_request_bytes, self._config.body_timeout)
        body.is_held_back = any(name == b"expect" for name, _ in scope["headers"])
        has_begun = False

        async def pass_on(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await body.drain()
            await send(message)

        try:
            self._check_length(scope)
            await self._app(scope, body, pass_on)
        except OctavoError as error:
            if has_begun:
                raise
            await error_response(error, self._error_format)(scope, body, pass_on)

    def _check_length(self, scope: dict[str, Any]) -> None:
        """Refuse a ``Content-Length`` that is too much, or no number.

        Raises:
            HTTPRefusal: It is.
        """
        length = declared_length(scope)
        if length is None:
            raise HTTPRefusal(400, "Content-Length is no number", "invalid_request")
        if length > self._config.max_request_bytes:
            raise too_large(self._config.max_request_bytes)


class AdmissionLayer:
    """ASGI layer: takes room for a request that makes the engine work as soon as its head is there.

    Args:
        app: What is behind.
        admission: Keeps the books.
        root_path: Prefix that the application strips from paths.
        error_format: Of error bodies.
    """

    def __init__(self, app: Any, admission: Admission, *, root_path: str = "", error_format: str = "openai") -> None:
        self._app = app
        self._admission = admission
        self._root_path = root_path
        self._error_format = error_format

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http" or not is_counted(scope["method"], routed_path(scope, self._root_path)):
            await self._app(scope, receive, send)
            return
        try:
            has_room = NO_ROOM not in (scope.get("extensions") or ())
            ticket = self._admission.enter(declared_length(scope) or 0, has_room=has_room)
        except OctavoError as error:
            await error_response(error, self._error_format)(scope, receive, send)
            return
        with ticket:
            await self._app(scope, receive, send)


def declared_length(scope: dict[str, Any]) -> int | None:
    """``Content-Length``: 0 where there is none, None where it is no number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) <= 20 else None
    return 0


def too_large(max_bytes: int) -> HTTPRefusal:
    """The refusal of a body over the limit."""
    return HTTPRefusal(
        413,
        f"the body is longer than {max_bytes} bytes, the most that --max-request-bytes allows",
        "request_too_large",
    )


class BoundedBody:
    """An ASGI ``receive`` that counts bytes and time until the body is complete.

    Args:
        receive: The server's.
        max_bytes: Of the whole body.
        timeout_s: From now to its end.
    """

    __slots__ = ("_deadline_s", "_is_complete", "_max_bytes", "_num_bytes", "_receive", "_timeout_s", "is_held_back")

    def __init__(self, receive: Any, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._num_bytes = 0
        self._is_complete = False
        self.is_held_back = False
        """The client waits for a word before it sends the body (``Expect: 100-continue``)."""

    async def __call__(self) -> Any:
        """The next message.

        Raises:
            HTTPRefusal: The body is too long, or too slow.
        """
        if self._is_complete:
            return await self._receive()
        self.is_held_back = False
        try:
            async with asyncio.timeout(max(0.0, self._deadline_s - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self._is_complete = True  # nothing more is waited for
            raise HTTPRefusal(
                408,
                f"the body did not arrive within {self._timeout_s:g} s",
                "body_timeout",
                headers={"connection": "close"},
            ) from None
        self._note(message)
        if self._num_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        return message

    async def drain(self) -> None:
        """Throw away what the application did not want to read."""
        if self.is_held_back:
            return
        deadline_s = min(self._deadline_s, time.monotonic() + DRAIN_S)
        while not self._is_complete and self._num_bytes < DRAIN_BYTES:
            try:
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    self._note(await self._receive())
            except TimeoutError:
                return

    def _note(self, message: dict[str, Any]) -> None:
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)

"""The outermost layer of the application: how long a body may be and take, and room for the request, before any route.

Pure ASGI, knows no route but through ``paths.py``, and no web server.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from octavo.config.guard import GuardConfig
from octavo.errors import OctavoError
from octavo.server.admission import Admission
from octavo.server.openai_errors import HTTPRefusal, error_response
from octavo.server.paths import is_counted, routed_path


class RequestLimits:
    """ASGI layer: bounds bodies, and takes room for a request when its head has come.

    Args:
        app: What is behind.
        config: Sizes and times.
        admission: Takes room for requests that make the engine work; None: there is always room.
        root_path: Prefix that the application strips from paths.
        error_format: Of error bodies.
    """

    def __init__(
        self, app: Any, config: GuardConfig, admission: Admission | None = None, *, root_path: str = "",
        error_format: str = "openai",
    ) -> None:  # fmt: skip
        self._app = app
        self._config = config
        self._admission = admission
        self._root_path = root_path
        self._error_format = error_format

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def note(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._serve(scope, receive, note)
        except OctavoError as error:
            if has_begun:
                raise
            await error_response(error, self._error_format)(scope, receive, send)

    async def _serve(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        length = self._declared_length(scope)
        bounded = BoundedBody(receive, self._config.max_request_bytes, self._config.body_timeout)
        if self._admission is None or not is_counted(scope["method"], routed_path(scope, self._root_path)):
            await self._app(scope, bounded, send)
            return
        with self._admission.enter(length):
            await self._app(scope, bounded, send)

    def _declared_length(self, scope: dict[str, Any]) -> int:
        """``Content-Length``, 0 where there is none.

        Raises:
            HTTPRefusal: It is too much, or no number.
        """
        for name, value in scope["headers"]:
            if name != b"content-length":
                continue
            if not value.isdigit() or len(value) > 20:
                raise HTTPRefusal(400, "Content-Length is no number", "invalid_request")
            if int(value) > self._config.max_request_bytes:
                raise too_large(self._config.max_request_bytes)
            return int(value)
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

    def __init__(self, receive: Any, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._num_bytes = 0
        self._is_complete = False

    async def __call__(self) -> Any:
        """The next message.

        Raises:
            HTTPRefusal: The body is too long, or too slow.
        """
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline_s - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPRefusal(
                408,
                f"the body did not arrive within {self._timeout_s:g} s",
                "body_timeout",
                headers={"connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
        return message

"""Ask an ASGI application without a socket.

``octavo run-batch`` does, so that a row is checked and answered by the very routes of the server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
ASGIApp = Callable[[dict[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any]


async def post(app: ASGIApp, path: str, body: dict[str, Any], request_id: str) -> tuple[int, Any]:
    """POST a JSON body.

    Args:
        app: The application.
        path: Of the route.
        body: The request.
        request_id: Sent as ``X-Request-Id``.

    Returns:
        Status and decoded body; None for one that is not JSON.
    """
    data = json.dumps(body).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
    return await _Exchange(data).run(app, scope)


class _Exchange:
    """One request and what comes back."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data
        self._status = 500
        self._answer = bytearray()

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> tuple[int, Any]:
        await app(scope, self._receive, self._send)
        try:
            return self._status, json.loads(self._answer)
        except ValueError:
            return self._status, None

    async def _receive(self) -> Message:
        if self._data is None:
            # A client that stays: the application cancels this wait when it has answered.
            await asyncio.Event().wait()
        data, self._data = self._data, None
        return {"type": "http.request", "body": data, "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._answer += message.get("body", b"")

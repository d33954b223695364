"""An id for every HTTP request, in and out: the client's ``X-Request-Id``, or one drawn."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from typing import Any

from octavo.server.service import ASGIApp
from octavo.server.sse import DIRECT_SEND

HEADER = b"x-request-id"
IDS_AT_ONCE = 64
_POSSIBLE = re.compile(rb"[!-~]{1,128}")
"""Printable, and no blanks: it goes into logs and headers."""


class RandomIds:
    """128 random bits at a time, as hexadecimal digits; the system is asked for many at once, as each call costs as
    much as all the rest of a refusal."""

    def __init__(self) -> None:
        self._left = ""

    def __call__(self) -> str:
        """The next one."""
        if not self._left:
            self._left = os.urandom(16 * IDS_AT_ONCE).hex()
        drawn, self._left = self._left[:32], self._left[32:]
        return drawn


def request_ids(app: ASGIApp, *, shown: bool) -> ASGIApp:
    """``app`` with ``scope["state"]["request_id"]`` set, and if ``shown`` the id in every answer's headers."""

    draw = RandomIds()

    async def with_id(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        request_id = given.decode("ascii") if _POSSIBLE.fullmatch(given) else None
        state = scope.setdefault("state", {})
        state[DIRECT_SEND] = send
        state["given_request_id"] = request_id
        state["request_id"] = request_id or draw()
        has_begun = False

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                headers = message.setdefault("headers", [])
                if not any(name.lower() == HEADER for name, _ in headers):
                    message["headers"] = [*headers, (HEADER, state["request_id"].encode())]
            await send(message)

        try:
            await app(scope, receive, send_with_id if shown else send)
        finally:
            del state[DIRECT_SEND]  # it leads to the web server's side of the request, which has the scope: a cycle

    return with_id

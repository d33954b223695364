"""Keys: an ASGI layer that lets nothing through without one, health checks aside.

Decides on the path that is routed and denies by default, so that a route that is added tomorrow is closed. Keys are
compared as digests, all of them each time, in constant time. Knows nothing of tenants but a name per key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Sequence
from typing import Any

from octavo.server.openai_errors import HTTPRefusal, error_response
from octavo.server.paths import HEALTH, is_admin, routed_path


class KeyRing:
    """Digests of the keys that are good for something.

    Args:
        keys: In the order of the configuration.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, token: bytes) -> int | None:
        """Which key this is, None if it is none. Takes the same time for all tokens of a length."""
        given = _digest(token)
        found = None
        for index, digest in enumerate(self._digests):
            if hmac.compare_digest(given, digest):
                found = index
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyCheck:
    """ASGI layer: the first of the keys' guards that a request meets.

    Without ordinary keys all ordinary routes are open; without administrators' keys theirs do not exist.

    Args:
        app: What is behind.
        keys: Ordinary keys.
        admin_keys: Keys for everything.
        root_path: Prefix that the application strips from paths.
        error_format: Of error bodies.
    """

    def __init__(
        self, app: Any, keys: Sequence[str], admin_keys: Sequence[str] = (), *, root_path: str = "",
        error_format: str = "openai",
    ) -> None:  # fmt: skip
        self._app = app
        self._keys = KeyRing(keys)
        self._admin_keys = KeyRing(admin_keys)
        self._root_path = root_path
        self._error_format = error_format

    def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        """As ASGI wants it; no coroutine of its own, which would last as long as the answer."""
        if scope["type"] == "http":
            refusal = self._check(scope)
            if refusal is not None:
                return error_response(refusal, self._error_format)(scope, receive, send)
        elif scope["type"] != "lifespan":
            return _nothing()  # nothing else is served
        return self._app(scope, receive, send)

    def _check(self, scope: dict[str, Any]) -> HTTPRefusal | None:
        """Why this request is not let through; None if it is. Names the tenant in the scope's state."""
        path = routed_path(scope, self._root_path)
        if path in HEALTH:
            return None
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        token = _bearer(given[0]) if len(given) == 1 else None
        is_administrator = token is not None and self._admin_keys.find(token) is not None
        if is_admin(path) and not is_administrator:
            where = f"{scope['method']} {path[:200]}"
            return HTTPRefusal(404, f"Invalid URL ({where})", "unknown_url")
        if not self._keys or is_administrator:
            return None
        if token is None:
            return HTTPRefusal(
                401,
                "no API key was given: send it as a header, Authorization: Bearer KEY",
                None,
                headers={"www-authenticate": "Bearer"},
            )
        index = self._keys.find(token)
        if index is None:
            return HTTPRefusal(
                401, "the API key is not known here", "invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
        scope.setdefault("state", {})["tenant"] = f"key-{index + 1}"
        return None


async def _nothing() -> None: ...


def _bearer(header: bytes) -> bytes | None:
    scheme, _, token = header.partition(b" ")
    token = token.strip()
    return token if scheme.lower() == b"bearer" and token else None

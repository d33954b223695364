"""How long a request may take in all. Knows nothing of what it does meanwhile, nor of how long it may wait."""

from __future__ import annotations

import asyncio

from octavo.errors import OctavoError, RequestTimeoutError


class Deadline:
    """The limit of one request, counted from now.

    Args:
        timeout_ms: Until the end; None for no limit.
    """

    def __init__(self, timeout_ms: int | None) -> None:
        self._timeout_ms = timeout_ms
        now = asyncio.get_running_loop().time()
        self._end = None if timeout_ms is None else now + timeout_ms / 1000

    def scope(self) -> asyncio.Timeout:
        """To be entered around the work, which it ends with TimeoutError."""
        return asyncio.timeout_at(self._end)

    def error(self) -> OctavoError:
        """What to say after the TimeoutError."""
        return RequestTimeoutError(
            f"the answer was not complete within timeout_ms ({self._timeout_ms} ms)", param="timeout_ms"
        )

"""The requests that run in one HTTP process, by the ids that their clients know."""

from __future__ import annotations

import itertools

PREFIXES = ("", "chatcmpl-", "cmpl-", "embd-", "pool-", "classify-", "score-", "rerank-")
"""What routes put before a client's id of its request."""


def names_of(request_id: str) -> list[str]:
    """Ids that a client may mean by one: the id of an answer, or that of an ``X-Request-Id`` header."""
    return [prefix + request_id for prefix in PREFIXES]


class OpenRequests:
    """Requests that run, by the id that their client knows: what an abort looks up."""

    def __init__(self) -> None:
        self._engine_ids: dict[str, tuple[str, list[str]]] = {}
        self._aborted: set[str] = set()
        self._next = itertools.count()

    def engine_ids(self, request_id: str, tenant: str | None = None) -> list[str]:
        """The engine's ids of a request; empty when it does not run, or is not that tenant's."""
        owner, ids = self._engine_ids.get(request_id, ("", []))
        return ids if tenant is None or owner == tenant else []

    def abort(self, request_id: str, tenant: str | None = None) -> list[str]:
        """Note that a request is to end, and return the engine's ids of it, to be ended there. Whoever was about to
        give it to the engine asks ``is_aborted`` afterwards."""
        ids = self.engine_ids(request_id, tenant)
        if ids:
            self._aborted.add(request_id)
        return ids

    def is_aborted(self, shown: str) -> bool:
        """Whether ``abort`` was called for a request that runs."""
        return shown in self._aborted

    def open(self, request_id: str, tenant: str, num_prompts: int) -> tuple[str, list[str]]:
        """Take a request in.

        Returns:
            The id to show, which is ``request_id`` unless another one runs under it, and an engine id per prompt.
        """
        shown = request_id
        while shown in self._engine_ids:
            shown = f"{request_id}-{next(self._next)}"  # a client, or its proxy, sends an id again
        ids = [shown if num_prompts == 1 else f"{shown}/{index}" for index in range(num_prompts)]
        self._engine_ids[shown] = (tenant, ids)
        return shown, ids

    def close(self, shown: str) -> None:
        """It is over."""
        self._engine_ids.pop(shown, None)
        self._aborted.discard(shown)

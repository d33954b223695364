"""``/metrics``: every number there is, for Prometheus; and the layer that counts HTTP requests.

The numbers are the engine's last snapshot and the request statistics, see ``observability/metrics.py``; asking costs
the engine nothing and works while it loads, hangs or is dead. With several HTTP processes whoever is asked answers for
all (``observability/shared.py``).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from octavo.observability.loop_lag import LoopLag
from octavo.observability.metrics import Metric, request_metrics
from octavo.observability.prometheus import CONTENT_TYPE, render
from octavo.observability.request_stats import RequestStats, StatsRecord
from octavo.observability.shared import StatsShare
from octavo.server.service import ASGIApp, Service

UNROUTED = "(none)"
_METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))


class ServerMetrics:
    """The numbers of one HTTP process, and of its siblings if it has any.

    Args:
        service: Whose engine is asked; it may come later.
        share_folder: Where sibling processes leave their numbers; None for a process without siblings.
        index: Of this process among them.
    """

    def __init__(self, service: Service, *, share_folder: str | None = None, index: int = 0) -> None:
        self._service = service
        self._index = index
        self._http = RequestStats()
        self._lag: LoopLag | None = None
        self._share = None
        if share_folder is not None:
            self._share = StatsShare(self._record, share_folder, index)
            self._share.start()

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter of the server; see ``RequestStats.count``."""
        self._http.count(name, amount, **labels)

    def all(self) -> list[Metric]:
        """All metrics, now."""
        if self._share is not None:
            total = self._share.total()
        else:
            total = RequestStats()
            total.merge(self._record())
        engine = self._service.engine
        if engine is None:
            return request_metrics(total, "")
        return engine.latest_metrics(total)

    def num_open(self) -> int:
        """Open requests that make the engine work: of this process as of now, of the others as of their last second."""
        admission = self._service.admission
        others = 0 if self._share is None else sum(each.num_open for each in self._share.others())
        return others + (0 if admission is None else admission.num_requests)

    def page(self) -> bytes:
        """The body for a scraper."""
        mirror = self._service.config.mirror_vllm_metrics
        return render(self.all(), mirror=mirror, with_process=self._share is None)

    def layer(self, app: ASGIApp) -> ASGIApp:
        """Count what passes through; to be put in front of everything that may refuse."""

        async def counted(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = 0
            if self._lag is None:  # the first request: now there is a loop to be watched
                self._lag = LoopLag(self._http.loop_lag)

            async def watch(message: MutableMapping[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watch)
            finally:
                # 499, as others write it: the client went before there was an answer.
                self.count("http_requests", route=_route(scope), method=_method(scope), status=str(status or 499))

        return counted

    def close(self) -> None:
        """Leave the last numbers to the siblings."""
        if self._lag is not None:
            self._lag.stop()
        if self._share is not None:
            self._share.close()

    def _record(self) -> StatsRecord:
        mine = RequestStats()
        mine.merge(self._http.record())
        engine = self._service.engine
        stats = None if engine is None else engine.request_stats
        if stats is not None:
            mine.merge(stats.record())
        events = self._service.engine_events
        if events is not None:
            # All processes see one engine start anew, and each has its own requests.
            mine.count("engine_restarts", events.num_restarts if self._index == 0 else 0)
            mine.count("requests_replayed", events.num_replayed)
        record = mine.record()
        record.num_open = 0 if self._service.admission is None else self._service.admission.num_requests
        return record


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["observability"])

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """All metrics in Prometheus's text format."""
        source = service.metrics if service.metrics is not None else ServerMetrics(service)
        return Response(source.page(), headers={"content-type": CONTENT_TYPE})

    return router


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's template: paths come from clients and would make endless labels."""
    return getattr(scope.get("route"), "path", None) or UNROUTED


def _method(scope: MutableMapping[str, Any]) -> str:
    method = scope["method"]
    return method if method in _METHODS else "other"

"""Routes that say how the server is: ``/health``, ``/livez``, ``/readyz``, ``/ping``, ``/load``.

``/livez`` answers while the event loop turns; ``/health`` and ``/ping`` only while the engine works, seen by the steps
that it finishes; ``/readyz`` only where traffic should be sent. They ask no engine: they answer in time when it hangs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octavo.errors import OctavoError
from octavo.server.openai_errors import error_response
from octavo.server.service import Service

Handler = Callable[[Request], Awaitable[Response]]
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the error says why."}}


def make_router(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(tags=["Health"])

    def answer(error: OctavoError | None) -> Response:
        if error is not None:
            return error_response(error, service.config.error_format)
        phase = "ready" if service.lifecycle is None else service.lifecycle.phase
        return JSONResponse({"status": phase})

    async def live(_request: Request) -> Response:
        """Whether the HTTP process lives."""
        return answer(None)

    async def healthy(_request: Request) -> Response:
        """Whether the engine works."""
        return answer(None if service.lifecycle is None else service.lifecycle.unhealthy())

    async def ready(_request: Request) -> Response:
        """Whether traffic should come here."""
        return answer(None if service.lifecycle is None else service.lifecycle.unready())

    async def load(_request: Request) -> Response:
        """How many requests are open, in all HTTP processes."""
        if service.metrics is not None:  # it knows of the siblings of this process, if there are any
            return JSONResponse({"server_load": service.metrics.num_open()})
        return JSONResponse({"server_load": 0 if service.admission is None else service.admission.num_requests})

    routes: list[tuple[str, Handler, list[str]]] = [
        ("/livez", live, ["GET", "HEAD"]),
        ("/health/live", live, ["GET", "HEAD"]),
        ("/health", healthy, ["GET", "HEAD"]),
        ("/ping", healthy, ["GET", "HEAD", "POST"]),
        ("/readyz", ready, ["GET", "HEAD"]),
        ("/health/ready", ready, ["GET", "HEAD"]),
        ("/load", load, ["GET"]),
    ]
    for path, handler, methods in routes:
        for method in methods:  # HEAD: many a load balancer wants the status alone
            name = f"{handler.__name__}_{method.lower()}_{path.strip('/').replace('/', '_')}"
            responses = {} if handler in (live, load) else NOT_READY
            router.add_api_route(
                path, handler, methods=[method], operation_id=name, response_class=JSONResponse, responses=responses
            )
    return router

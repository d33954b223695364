"""The ASGI application: routers behind request ids, CORS and whatever layers the service brings.

Each area is a module with ``make_router(service)``, named in ROUTERS. Knows no route itself, and no web server: any
ASGI server can run what ``build_app`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import OctavoError
from octavo.server import admin, chat, completions, embeddings, health, metrics, models, requests, timeline, tokenize
from octavo.server.openai_errors import HTTPRefusal, error_response, log_internal
from octavo.server.request_ids import request_ids
from octavo.server.service import ASGIApp, Service
from octavo.server.sse import ClientGoneError

CLIENT_GONE = 499
"""As others write it: the client went before there was an answer."""
ROUTERS: tuple[Callable[[Service], APIRouter], ...] = (
    models.make_router,
    chat.make_router,
    completions.make_router,
    tokenize.make_router,
    embeddings.make_router,
    requests.make_router,
    health.make_router,
    admin.make_router,
    metrics.make_router,
    timeline.make_router,
)
"""One entry per area."""


def build_app(service: Service) -> ASGIApp:
    """Put the application together.

    Args:
        service: What the routes use; its engine may come later.
    """
    return with_layers(service, make_routes(service))


def make_routes(service: Service) -> FastAPI:
    """All routes, without what stands in front of them."""
    config = service.config
    docs = None if config.disable_fastapi_docs else "/docs"
    app = FastAPI(
        title="Octavo",
        docs_url=docs,
        redoc_url=docs and "/redoc",
        openapi_url=docs and "/openapi.json",
        redirect_slashes=False,
    )
    for make_router in ROUTERS:
        app.include_router(make_router(service))
    _add_error_handlers(app, config.error_format)
    return app


def with_layers(service: Service, app: ASGIApp) -> ASGIApp:
    """``app`` behind the service's layers."""
    config = service.config
    stack: ASGIApp = _contained(app)
    stack = stack if config.root_path is None else _rooted(stack, config.root_path)
    for layer in reversed(service.layers):
        stack = layer(stack)
    with_cors = CORSMiddleware(
        stack,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=["X-Request-Id"],
    )
    return request_ids(with_cors, shown=config.enable_request_id_headers)


def _contained(app: ASGIApp) -> ASGIApp:
    """``app`` whose failures are answered and logged, once, and go no further."""

    async def contained(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:  # border of the application: the client has its answer by now
            log_internal(error, scope)

    return contained


def _rooted(app: ASGIApp, root_path: str) -> ASGIApp:
    """``app`` told that all its paths begin with ``root_path``, whether the proxy in front strips that or not."""

    async def rooted(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await app({**scope, "root_path": root_path}, receive, send)

    return rooted


def describe_routes(app: FastAPI) -> list[str]:
    """A line per route, for the log."""
    paths: dict[str, Any] = app.openapi()["paths"]
    return [f"Route: {path}, Methods: {', '.join(sorted(each)).upper()}" for path, each in paths.items()]


def _add_error_handlers(app: FastAPI, error_format: str) -> None:
    async def on_octavo_error(_request: Request, error: Any) -> Response:
        return error_response(error, error_format)

    async def on_http_exception(request: Request, error: Any) -> Response:
        where = f"{request.method} {request.scope.get('path', '')[:200]}"
        if error.status_code == 404:
            refusal = HTTPRefusal(404, f"Invalid URL ({where})", "unknown_url")
        elif error.status_code == 405:
            refusal = HTTPRefusal(
                405, f"Not allowed to {where}", "method_not_supported", headers=dict(error.headers or {})
            )
        else:
            refusal = HTTPRefusal(error.status_code, str(error.detail), None, headers=dict(error.headers or {}))
        return error_response(refusal, error_format)

    async def on_client_gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)  # nobody reads it

    async def on_other(_request: Request, error: Exception) -> Response:
        return error_response(error, error_format)  # and it is raised once more, see _contained

    app.add_exception_handler(OctavoError, on_octavo_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(Exception, on_other)

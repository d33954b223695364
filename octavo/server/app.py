"""The ASGI application: routers behind request ids, CORS and whatever layers the service brings.

Each area is a module with ``make_router(service)``, named in ROUTERS. Routes of fixed paths are called directly
(``dispatch.py``); FastAPI finds the others and describes all of them. Knows no route itself, and no web server: any
ASGI server can run what ``build_app`` returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from octavo.errors import OctavoError
from octavo.server import admin, chat, completions, embeddings, health, metrics, models, requests, timeline, tokenize
from octavo.server.dispatch import DirectRoutes, Dispatch, direct_routes
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


@dataclass(frozen=True, slots=True)
class Routes:
    """All routes, without what stands in front of them."""

    framework: FastAPI
    """Finds every route, and describes them."""
    direct: DirectRoutes
    """Those that are called without it."""


def build_app(service: Service) -> ASGIApp:
    """Put the application together.

    Args:
        service: What the routes use; its engine may come later.
    """
    return with_layers(service, make_routes(service))


def make_routes(service: Service) -> Routes:
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
    routers = [make_router(service) for make_router in ROUTERS]
    for router in routers:
        app.include_router(router)
    _add_error_handlers(app, config.error_format)
    return Routes(app, direct_routes(routers))


def with_layers(service: Service, routes: Routes) -> ASGIApp:
    """``routes`` behind the service's layers."""
    config = service.config

    def answer_to(error: Exception, scope: MutableMapping[str, Any]) -> Response:
        if isinstance(error, ClientGoneError | ClientDisconnect):
            return Response(status_code=CLIENT_GONE)  # nobody reads it
        if not isinstance(error, OctavoError):
            log_internal(error, scope)
        return error_response(error, config.error_format)

    stack: ASGIApp = Dispatch(routes.direct, routes.framework, answer_to)
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
    return request_ids(_only_for_browsers(with_cors, stack), shown=config.enable_request_id_headers)


def _only_for_browsers(with_cors: ASGIApp, app: ASGIApp) -> ASGIApp:
    """``app``, behind CORS only where that can make a difference: an answer to a POST is in no cache, so that one
    without an origin gets nothing from it."""

    def chosen(scope: MutableMapping[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        is_plain = scope.get("method") == "POST" and not any(name == b"origin" for name, _ in scope["headers"])
        return (app if is_plain else with_cors)(scope, receive, send)

    return chosen


def _rooted(app: ASGIApp, root_path: str) -> ASGIApp:
    """``app`` told that all its paths begin with ``root_path``, whether the proxy in front strips that or not."""

    async def rooted(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await app({**scope, "root_path": root_path}, receive, send)

    return rooted


def describe_routes(routes: Routes) -> list[str]:
    """A line per route, for the log."""
    paths: dict[str, Any] = routes.framework.openapi()["paths"]
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
        return error_response(error, error_format)  # and it is raised once more, see Dispatch

    app.add_exception_handler(OctavoError, on_octavo_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_other)

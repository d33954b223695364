"""The short way to routes of fixed paths: one look-up instead of a framework's stack of layers.

FastAPI's stack costs a request as much as everything that the route itself does, and holds some twenty frames for as
long as an answer streams. A route that takes the request or nothing, and that makes its own ``Response``, needs none of
it. All else goes to the application behind: parameters in paths, other methods, unknown paths, the documentation.
Knows no route itself.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.openai_errors import log_internal
from octavo.server.paths import routed_path

ASGIApp = Callable[..., Any]
ErrorAnswer = Callable[[Exception, dict[str, Any]], Response]
"""Makes the answer to a request (its scope) that ended with an exception."""


@dataclass(frozen=True, slots=True)
class DirectRoute:
    """A route that can be called as it is."""

    route: APIRoute
    endpoint: Callable[..., Awaitable[Response]]
    takes_request: bool


DirectRoutes = dict[tuple[str, str], DirectRoute]
"""By method and path."""


def direct_routes(routers: Iterable[APIRouter]) -> DirectRoutes:
    """Those routes that need no framework around them: a fixed path, no parameter but the request, a ``Response``."""
    found: DirectRoutes = {}
    for router in routers:
        for route in router.routes:
            if not isinstance(route, APIRoute) or "{" in route.path or route.dependencies:
                continue
            hints = typing.get_type_hints(route.endpoint)
            answer: Any = hints.pop("return", None)
            parameters = list(inspect.signature(route.endpoint).parameters)
            is_plain = not parameters or (len(parameters) == 1 and hints.get(parameters[0]) is Request)
            if is_plain and isinstance(answer, type) and issubclass(answer, Response):
                direct = DirectRoute(route, route.endpoint, bool(parameters))
                found.update({(method, route.path): direct for method in route.methods or ()})
    return found


class Dispatch:
    """ASGI application: calls direct routes, and hands on everything else. What fails is answered and logged, once, and
    goes no further.

    Args:
        routes: By method and path.
        others: Gets all other requests.
        answer_to: For what a route raises.
    """

    def __init__(self, routes: DirectRoutes, others: ASGIApp, answer_to: ErrorAnswer) -> None:
        self._routes = routes
        self._others = others
        self._answer_to = answer_to

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI wants it."""
        found = None if scope["type"] != "http" else self._routes.get((scope["method"], routed_path(scope)))
        try:
            if found is None:
                await self._others(scope, receive, send)
                return
            scope["route"] = found.route
            await (await self._ask(found, scope, receive))(scope, receive, send)
        except Exception as error:  # border of the application: the client has its answer by now, or none will help
            log_internal(error, scope)

    async def _ask(self, found: DirectRoute, scope: dict[str, Any], receive: Any) -> Response:
        # A frame of its own: while an answer streams, neither the request nor what was raised is held.
        try:
            return await (found.endpoint(Request(scope, receive)) if found.takes_request else found.endpoint())
        except Exception as error:  # border of the routes: whatever it is has an answer
            return self._answer_to(error, scope)

"""``/v1/requests/{id}/timeline``: when a request was queued, scheduled, preempted and finished.

The engine keeps the last thousand finished sequences and answers for all HTTP processes. There is nothing in it of what
was asked or answered.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from octavo.observability.history import CAPACITY
from octavo.observability.timeline import describe_timeline
from octavo.server.generation import tenant_of
from octavo.server.open_requests import names_of
from octavo.server.openai_errors import HTTPRefusal
from octavo.server.openapi import error_responses
from octavo.server.service import Service
from octavo.utils.text import format_count, shorten


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["observability"])

    @router.get("/v1/requests/{request_id}/timeline", responses=error_responses(401, 404, 503))
    async def timeline(request_id: str, request: Request) -> dict[str, Any]:
        """What became of a request, with times."""
        tenant = tenant_of(request)
        engine = service.need_engine
        for name in names_of(request_id):
            known = await engine.timeline(name)
            sequences = [each for each in known if each.tenant == tenant]  # not those of others who chose the same id
            if sequences:
                break
        else:
            raise HTTPRefusal(
                404,
                f"no request {shorten(request_id, 100)!r} is running or among the last {format_count(CAPACITY)} that "
                "finished; ids are those of answers (id) and of the X-Request-Id header",
                "request_not_found",
                param="request_id",
            )
        return describe_timeline(request_id, sequences)

    return router

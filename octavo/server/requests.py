"""``/version``, and aborting requests by id."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from octavo.errors import OctavoError
from octavo.server.answers import installed_version
from octavo.server.body import check_body, read_json
from octavo.server.generation import DEFAULT_TENANT, tenant_of
from octavo.server.openapi import error_responses, json_route
from octavo.server.schemas.tokens import AbortRequest
from octavo.server.service import Service
from octavo.utils.text import shorten


class MissingRequestError(OctavoError):
    """No such request runs."""

    status = 404
    code = "request_not_found"


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/version", tags=["server"])
    async def version() -> dict[str, str]:
        """Of the server."""
        return {"version": installed_version()}

    @router.post(
        "/v1/requests/{request_id}/abort",
        tags=["requests"],
        response_model=None,
        responses=error_responses(401, 404, 503),
    )
    async def abort(request: Request, request_id: str) -> dict[str, Any]:
        """End a request that runs; its reader gets what there is, with finish_reason abort."""
        ids = _find(service, request, request_id)
        if not ids:
            raise MissingRequestError(f"no request {shorten(request_id, 100)!r} runs here", param="request_id")
        await service.need_engine.abort(ids)
        return {"id": request_id, "object": "request.abort", "aborted": True}

    @router.post("/abort_requests", tags=["requests"], **json_route(AbortRequest))
    async def abort_requests(request: Request) -> dict[str, Any]:
        """End several; those that do not run are left out."""
        fields = check_body(AbortRequest, await read_json(request))
        found = {each: ids for each in fields.request_ids if (ids := _find(service, request, each))}
        await service.need_engine.abort([engine_id for ids in found.values() for engine_id in ids])
        return {"aborted": list(found)}

    return router


def _find(service: Service, request: Request, request_id: str) -> list[str]:
    """Engine ids behind a client's id, with or without the prefix of its route. Nobody finds another tenant's."""
    tenant = tenant_of(request)
    owner = None if tenant == DEFAULT_TENANT else tenant
    for prefix in ("", "chatcmpl-", "cmpl-"):
        ids = service.open_requests.engine_ids(prefix + request_id, owner)
        if ids:
            return ids
    return []

"""``/version``, and aborting requests by id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from octavo.errors import OctavoError
from octavo.server.answers import installed_version
from octavo.server.body import check_body, read_json
from octavo.server.generation import DEFAULT_TENANT, tenant_of
from octavo.server.open_requests import names_of
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
        if not await _abort(service, request, [request_id]):
            raise MissingRequestError(f"no request {shorten(request_id, 100)!r} runs here", param="request_id")
        return {"id": request_id, "object": "request.abort", "aborted": True}

    @router.post("/abort_requests", tags=["requests"], **json_route(AbortRequest))
    async def abort_requests(request: Request) -> dict[str, Any]:
        """End several; those that do not run are left out."""
        fields = check_body(AbortRequest, await read_json(request))
        return {"aborted": await _abort(service, request, fields.request_ids)}

    return router


async def _abort(service: Service, request: Request, request_ids: list[str]) -> list[str]:
    """End requests by their clients' ids, with or without the prefix of their route, whichever HTTP process has them.
    Nobody finds another tenant's. Returns those that ran."""
    tenant = tenant_of(request)
    owner = None if tenant == DEFAULT_TENANT else tenant
    engine, find = service.need_engine, service.open_requests.abort
    found = {each: ids for each in request_ids if (ids := _first(find(name, owner) for name in names_of(each)))}
    await engine.abort([engine_id for ids in found.values() for engine_id in ids])
    missing = [each for each in request_ids if each not in found]
    if not missing or service.config.api_server_count == 1:
        return list(found)
    # A sibling of this process may have them; the engine knows the requests of all.
    known = set(await engine.abort_everywhere([name for each in missing for name in names_of(each)], owner))
    return [each for each in request_ids if each in found or not known.isdisjoint(names_of(each))]


def _first(groups: Iterable[list[str]]) -> list[str]:
    return next((ids for ids in groups if ids), list[str]())

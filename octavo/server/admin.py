"""Routes that change the server itself. The key check (``auth.py``) hides them from everybody without an
administrator's key; ``paths.py`` lists them.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from octavo.server.openai_errors import HTTPRefusal
from octavo.server.openapi import error_responses
from octavo.server.service import Service


def make_router(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(tags=["Administration"])

    @router.post("/reset_prefix_cache", responses=error_responses(401, 404, 409, 503), response_model=None)
    async def reset_prefix_cache() -> JSONResponse:
        """Forget all cached prefixes. Only while nothing runs."""
        if not await service.need_engine.reset_prefix_cache():
            raise HTTPRefusal(409, "the prefix cache cannot be reset while requests run", "requests_running")
        return JSONResponse({"status": "reset"})

    return router

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

    @router.post("/start_profile", responses=error_responses(400, 401, 404, 503), response_model=None)
    async def start_profile() -> JSONResponse:
        """Begin to record the engine's work with torch's profiler, into --torch-profiler-dir."""
        await service.need_engine.start_profile()
        return JSONResponse({"status": "recording"})

    @router.post("/stop_profile", responses=error_responses(400, 401, 404, 503), response_model=None)
    async def stop_profile() -> JSONResponse:
        """End the recording; names the file on the server that it is in."""
        return JSONResponse({"status": "stopped", "file": await service.need_engine.stop_profile()})

    return router

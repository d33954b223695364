"""``/v1/models`` and ``/v1/models/{id}``: what is served here."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from octavo.server.openai_errors import MissingModelError
from octavo.server.openapi import error_responses
from octavo.server.service import Service
from octavo.utils.text import shorten


def served_names(service: Service) -> tuple[str, ...]:
    """Names of the model, the first is shown in answers.

    Raises:
        NotReadyError: They are not known yet.
    """
    return service.need_engine.ready.config.frontend.served_model_names


def check_model(service: Service, asked: str | None) -> str:
    """The name to answer under. A request that names no model gets the only one.

    Raises:
        MissingModelError: Another one was asked for.
        NotReadyError: The engine is not there yet.
    """
    names = served_names(service)
    if asked is None or asked in names:
        return asked or names[0]
    raise MissingModelError(
        f"the model {shorten(asked, 100)!r} does not exist here; served: {', '.join(names)}", param="model"
    )


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["models"])
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        config = service.need_engine.ready.config
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "octavo",
            "root": config.load.model or name,
            "parent": None,
            "max_model_len": config.scheduler.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{name}",
                    "object": "model_permission",
                    "created": created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }

    @router.get("/v1/models", responses=error_responses(401, 503))
    async def list_models() -> dict[str, Any]:
        """The names under which the model is served."""
        return {"object": "list", "data": [card(name) for name in served_names(service)]}

    @router.get("/v1/models/{model:path}", responses=error_responses(401, 404, 503))
    async def show_model(model: str) -> dict[str, Any]:
        """One of them."""
        return card(check_model(service, model))

    return router

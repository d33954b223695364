"""What ``/openapi.json`` says beyond FastAPI's own: bodies that routes read themselves, and the form of errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
DESCRIPTIONS = {
    400: "A field is missing, impossible, or not supported; param names it.",
    401: "A key is needed, or is wrong.",
    404: "No such model, route or request.",
    405: "Another method is needed.",
    408: "timeout_ms has passed.",
    409: "Something that runs is in the way; try again when it is done.",
    413: "The body is too large.",
    415: "The body is of a type that is not read.",
    429: "This key's own limit is reached; Retry-After says when to come back.",
    431: "The headers are too large.",
    500: "Something went wrong inside.",
    503: "No room, or not ready; Retry-After says when to come back.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``."""
    return {
        status: {"description": DESCRIPTIONS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in statuses
    }


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body itself."""
    schema = model.model_json_schema(mode="validation")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def generation_route(model: type[BaseModel], title: str) -> dict[str, Any]:
    """Keywords for a route that answers with JSON or, under ``stream``, with events.

    Args:
        model: Of the body.
        title: Of the answer, for the description.
    """
    answer: dict[str, Any] = {"type": "object", "title": title, "required": ["id", "object", "choices"]}
    return {
        "response_model": None,
        "openapi_extra": body_of(model),
        "responses": {
            200: {
                "description": "The answer, or a stream of chunks.",
                "content": {
                    "application/json": {"schema": answer},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **error_responses(400, 401, 404, 408, 413, 415, 429, 500, 503),
        },
    }


def json_route(model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Keywords for a route that answers with a JSON object."""
    extra = {} if model is None else {"openapi_extra": body_of(model)}
    late = [408] if model is not None and "timeout_ms" in model.model_fields else []
    return {
        "response_model": None,
        **extra,
        "responses": error_responses(400, 401, 404, *late, 413, 415, 429, 500, 503),
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Without ``$defs``: nobody else refers to them."""
    definitions: dict[str, Any] = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            reference: Any = node.get("$ref")  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
            if isinstance(reference, str):
                return resolve(definitions[reference.rsplit("/", 1)[-1]])
            return {key: resolve(value) for key, value in node.items()}  # pyright: ignore[reportUnknownVariableType]
        return [resolve(each) for each in node] if isinstance(node, list) else node  # pyright: ignore[reportUnknownVariableType]

    return resolve(schema)

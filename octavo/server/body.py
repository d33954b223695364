"""A request's body, from bytes to a checked model: one way for every route.

JSON is read strictly: UTF-8 only, no NaN or Infinity, no lone surrogates, bounded nesting, no rest behind the value.
Sizes and deadlines are the matter of the limits in front (``server/limits.py``).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from octavo.errors import InvalidRequestError
from octavo.server.long_body import parse_long_json
from octavo.server.openai_errors import HTTPRefusal, from_validation
from octavo.utils.text import shorten

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
INLINE_BYTES = 256 * 1024
"""A longer body is parsed and checked beside the event loop."""


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        HTTPRefusal: It is of another type, or compressed.
        InvalidRequestError: It is no JSON object.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPRefusal(
            415, f"the body is {shorten(kind, 60)!r}, but must be application/json", "unsupported_media_type"
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPRefusal(
            415, f"the body is compressed ({shorten(encoding, 60)!r}); send it plain", "unsupported_media_type"
        )
    body = await request.body()
    return await asyncio.to_thread(parse_json, body) if len(body) > INLINE_BYTES else parse_json(body)


async def checked_beside(request: Request, check: Callable[[], T]) -> T:
    """Call ``check`` on what ``read_json`` has read: beside the event loop if that is long."""
    is_long = len(await request.body()) > INLINE_BYTES
    return await asyncio.to_thread(check) if is_long else check()


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object out of bytes; a long one in slices, see ``long_body.py``.

    Raises:
        InvalidRequestError: It is none, or has too many values.
    """
    is_long = len(body) > INLINE_BYTES
    try:
        value = parse_long_json(body) if is_long else from_json(body, allow_inf_nan=False, cache_strings="keys")
    except InvalidRequestError:
        raise
    except ValueError as error:
        if is_long:  # places in it are of another text, and looking for a NaN would hold up everybody
            raise _no_json(str(error).partition(" at line")[0]) from None
        raise _no_number(body) or _no_json(str(error)) from None
    if not isinstance(value, dict):
        refusal = InvalidRequestError(f"the body must be a JSON object, but is a {type(value).__name__}")
        refusal.code = "invalid_type"
        raise refusal
    return cast("dict[str, Any]", value)


def _no_json(reason: str) -> InvalidRequestError:
    refusal = InvalidRequestError(f"could not parse the JSON body: {shorten(reason, 200)}")
    refusal.code = "invalid_json"
    return refusal


def _no_number(body: bytes) -> InvalidRequestError | None:
    """What to say of a body that would be JSON but for a NaN or an Infinity; None for another."""
    try:
        value = from_json(body, allow_inf_nan=True, cache_strings="keys")
    except ValueError:
        return None
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    name = next((key for key, each in fields.items() if isinstance(each, float) and not math.isfinite(each)), None)
    where = "the body has NaN or Infinity" if name is None else f"{name} is {fields[name]}"
    refusal = InvalidRequestError(f"{where}, but must be a finite number: JSON has no other", param=name)
    refusal.code = "invalid_type"
    return refusal


def check_body(model: type[M], body: Mapping[str, Any]) -> M:
    """The body as ``model``.

    Raises:
        InvalidRequestError: A field is missing or impossible; ``param`` names it.
    """
    try:
        checked = model.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None
    if logger.isEnabledFor(logging.DEBUG):
        unknown = [shorten(name, 40) for name in body if name not in model.model_fields]
        if unknown:
            logger.debug("ignoring unknown fields: %s", ", ".join(unknown[:20]))
    return checked

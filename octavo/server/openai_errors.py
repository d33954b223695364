"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and the right status.

The one place where an exception becomes a body, for every router and for streams that have begun. ``--error-format
vllm`` gives vLLM's types and integer codes instead. Says nothing of what went wrong inside: an exception that is not
an ``OctavoError`` is logged, and the client reads that it happened.
"""

from __future__ import annotations

import itertools
import logging
import math
import reprlib
from collections.abc import MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.responses import Response

from octavo.errors import InvalidRequestError, OctavoError
from octavo.utils.text import shorten

logger = logging.getLogger(__name__)
MAX_MESSAGE_CHARS = 2000
_TYPES = {401: "invalid_request_error", 403: "invalid_request_error", 429: "rate_limit_error"}
_FINAL = {"request_timeout", "request_quarantined"}
"""Codes that mean: not again. OpenAI's clients repeat whatever has status 408 or 5xx unless a header forbids it, and a
request whose time is up, or that ends engines, would cost all of that twice more."""
_VLLM_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError",
    503: "ServiceUnavailableError",
}  # fmt: skip


class MissingModelError(OctavoError):
    """No model of that name is served here."""

    status = 404
    code = "model_not_found"


class HTTPRefusal(OctavoError):  # noqa: N818 - it is what a client did, told in HTTP's words
    """A request that HTTP itself has a status for.

    Args:
        status: HTTP status.
        message: What was asked and what is possible.
        code: Stable name.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str | None, *, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, param=param)
        self.status = status
        self.code = code  # pyright: ignore[reportAttributeAccessIssue]
        self.headers = headers or {}


def error_body(error: BaseException, error_format: str = "openai") -> dict[str, Any]:
    """The body for an exception; see the module's text for the form."""
    status, code = status_of(error), getattr(error, "code", None)
    if isinstance(error, OctavoError):
        message, param = error.message, error.param
    else:
        message, param, code = "something went wrong inside the server; its log says what", None, "internal_error"
    # Half a surrogate pair can come in with a field's value and cannot go out as UTF-8.
    message = shorten(message, MAX_MESSAGE_CHARS).encode("utf-8", "replace").decode()
    param = None if param is None else shorten(param, 200).encode("utf-8", "replace").decode()
    if error_format == "vllm":
        kind = _VLLM_TYPES.get(status, HTTPStatus(status).phrase.replace(" ", "") + "Error")
        return {"error": {"message": message, "type": kind, "param": param, "code": status}}
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: BaseException) -> int:
    """The HTTP status for an exception."""
    return error.status if isinstance(error, OctavoError) else 500


def headers_of(error: BaseException) -> dict[str, str]:
    """Headers that belong to the error: ``Retry-After``, ``Allow`` and the like."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, OctavoError) and error.code in _FINAL:
        headers["X-Should-Retry"] = "false"
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(retry_after_s, int | float):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return headers


def error_response(error: BaseException, error_format: str = "openai") -> Response:
    """The whole answer to a request that ended with an exception."""
    return Response(
        msgspec.json.encode(error_body(error, error_format)),
        status_of(error),
        headers_of(error),
        media_type="application/json",
    )


def log_internal(error: BaseException, scope: MutableMapping[str, Any]) -> None:
    """An exception that nobody meant to raise: to the log, with its stack."""
    logger.error("%s %r failed", scope.get("method"), shorten(str(scope.get("path")), 200), exc_info=error)


# -------------------------------------------------------------------------------------- what pydantic found, in words

_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "enum": "invalid_value",
    "value_error": "invalid_value",
    "union_tag_invalid": "invalid_value",
    "union_tag_not_found": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "finite_number": "invalid_type",
    "bad_id": "invalid_value",
    "out_of_bounds": "invalid_value",
    "empty_array": "empty_array",
}


class _Brief(reprlib.Repr):
    """Looks at the beginning of a value only: one that is megabytes long is told of as fast as another."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxlong = 4, 40, 20, 90, 90

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        # The base class would sort all of it first.
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict)), level)


_BRIEF = _Brief()


def from_validation(error: ValidationError) -> InvalidRequestError:
    """What pydantic found, as one error about the first field that is wrong."""
    found = error.errors(include_url=False, include_context=True, include_input=True)
    # Of a union's branches, the one that came furthest is what the client meant; of equals max takes the first.
    first = max(found, key=lambda each: len(_path(each["loc"])))
    field = _param(_path(first["loc"]))
    kind, context = str(first["type"]), first.get("ctx") or {}
    refusal = InvalidRequestError(_words(field, kind, first, context), param=field or None)
    refusal.code = _code(kind, first.get("input"), context)
    return refusal


def _path(loc: Sequence[int | str]) -> list[int | str]:
    """Without the names of union branches, which are no fields."""
    return [part for part in loc if isinstance(part, int) or part.isidentifier() and not _is_branch(part)]


def _is_branch(part: str) -> bool:
    return part in ("str", "int", "float", "bool", "list", "dict", "none") or part[:1].isupper()


def _param(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _code(kind: str, value: object, context: dict[str, Any]) -> str:
    if kind in _CODES:
        return _CODES[kind]
    number = "integer" if all(isinstance(bound, int) for bound in context.values()) else "decimal"
    if kind.startswith("greater_than"):
        return f"{number}_below_min_value"
    if kind.startswith("less_than"):
        return f"{number}_above_max_value"
    if kind == "too_short":
        return "array_below_min_length" if value else "empty_array"
    return "array_above_max_length" if kind == "too_long" else "invalid_type"


def _words(field: str, kind: str, found: Any, context: dict[str, Any]) -> str:
    if kind == "missing":
        return f"{field} is missing, but is required"
    if kind == "value_error":
        return f"{field}: {context.get('error', found['msg'])}"
    shown = shorten(_BRIEF.repr(found.get("input")), 80)
    what = str(found["msg"])
    for opening in ("Input should be a valid ", "Input should be ", "List should have ", "String should have "):
        if what.startswith(opening):
            verb = "have" if opening.endswith("have ") else "be"
            what = what.removeprefix(opening).partition(" after validation")[0]
            return f"{field or 'the body'} is {shown}, but must {verb} {what}"
    return f"{field or 'the body'} is {shown}, but must be {what}"

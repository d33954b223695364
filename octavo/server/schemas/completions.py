"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from octavo.frontend.token_ids import all_in_range
from octavo.server.schemas.common import INT32_MAX, INT64_MAX, MAX_N, WHOLE, GenerationRequest

MAX_PROMPTS = 1024
MAX_IDS = 1 << 23
"""In all prompts of a request: more than any model's context."""

_ID_LIST: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        _ID_LIST,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _ID_LIST},
    ]
}


def _prompts(value: object) -> list[str | list[int]]:
    """Any of the four forms as a list of prompts. A union of pydantic would be slow on a million ids, and its errors
    would tell of every branch."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "a string, a list of token ids, or a list of either")
    items = cast("list[object]", value)
    if not items:
        raise PydanticCustomError("too_short", "a string, or a list that is not empty")
    if not isinstance(items[0], str | list):
        return [_ids(items, MAX_IDS)]
    if len(items) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", "at most 1024 prompts")
    if all(isinstance(item, str) for item in items):
        return cast("list[str | list[int]]", items)
    prompts: list[str | list[int]] = []
    left = MAX_IDS
    for item in items:
        prompts.append(_ids(item, left))
        left -= len(prompts[-1])
    return prompts


def _ids(value: object, most: int) -> list[int]:
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "all strings or all lists of token ids")
    if not value:
        raise PydanticCustomError("empty_array", "made of lists that are not empty")
    given = cast("list[Any]", value)
    if len(given) > most:
        raise PydanticCustomError("too_long", "at most {most} token ids in all", {"most": MAX_IDS})
    if all_in_range(given, INT32_MAX + 1):
        return given
    ids: list[Any] = [int(each) if type(each) is float and each.is_integer() else each for each in given]
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise PydanticCustomError("bad_id", "made of token ids: item {index} is no integer", {"index": index})
        if not 0 <= token_id <= INT32_MAX:
            raise PydanticCustomError("bad_id", "made of token ids: item {index} is out of range", {"index": index})
    return cast("list[int]", ids)


class CompletionRequest(GenerationRequest):
    """One or several texts, or lists of token ids, to go on with."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts, json_schema_input_type=Annotated[Any, WithJsonSchema(_SCHEMA)]),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX), WHOLE] | None = Field(
        None, description="Default: 16. 0 only with echo."
    )
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N), WHOLE] | None = Field(
        None, description="Generate this many and return the n likeliest per token; not with stream."
    )
    add_special_tokens: bool | None = Field(None, description="Add BOS where the model wants it. Default: true.")

"""JSON objects whose keys are the client's own, checked up to the first entry that is wrong.

Pydantic's own check of an object notes every wrong entry, and a body has room for millions of them. The bounds of free
objects (variables of a template, arguments of a plug-in) keep what a stranger sends away from recursion and from code
that expects finite numbers. Knows no field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_FREE_DEPTH = 16
MAX_FREE_ENTRIES = 10_000
MAX_FREE_CHARS = 1 << 18


def _object(value: object, max_entries: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "an object")
    table = cast("dict[str, Any]", value)
    if len(table) > max_entries:
        raise PydanticCustomError("too_long", "an object of at most {most} entries", {"most": max_entries})
    return table


def texts_table(max_entries: int) -> PlainValidator:
    """For an object whose values are texts."""

    def check(value: object) -> dict[str, Any]:
        table = _object(value, max_entries)
        if not all(isinstance(each, str) for each in table.values()):
            raise PydanticCustomError("string_type", "an object whose values are strings")
        return table

    return _validator(check, maxProperties=max_entries, additionalProperties={"type": "string"})


def numbers_table(max_entries: int) -> PlainValidator:
    """For an object whose values are finite numbers."""

    def check(value: object) -> dict[str, Any]:
        table = _object(value, max_entries)
        for each in table.values():
            if type(each) not in (int, float) or not math.isfinite(each):
                raise PydanticCustomError("float_type", "an object whose values are finite numbers")
        return table

    return _validator(check, maxProperties=max_entries, additionalProperties={"type": "number"})


def free_table() -> PlainValidator:
    """For any object within the bounds above, all of its numbers finite."""

    def check(value: object) -> dict[str, Any]:
        table = _object(value, MAX_FREE_ENTRIES)
        num_entries = num_chars = depth = 0
        level: list[object] = [table]
        while level:
            depth += 1
            if depth > MAX_FREE_DEPTH:
                raise PydanticCustomError("out_of_bounds", "nested at most {most} deep", {"most": MAX_FREE_DEPTH})
            num_chars += sum(map(_num_chars, level))
            level = [below for each in level for below in _parts(each)]
            num_entries += len(level)
            if num_entries > MAX_FREE_ENTRIES or num_chars > MAX_FREE_CHARS:
                raise PydanticCustomError(
                    "out_of_bounds", "of at most {entries} values and {chars} characters in all",
                    {"entries": MAX_FREE_ENTRIES, "chars": MAX_FREE_CHARS},
                )  # fmt: skip
        return table

    return _validator(check)


def _validator(check: Callable[[object], dict[str, Any]], **schema: Any) -> PlainValidator:
    return PlainValidator(check, json_schema_input_type=Annotated[Any, WithJsonSchema({"type": "object", **schema})])


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else ()


def _num_chars(value: object) -> int:
    """About what a value itself takes as text, without what is in it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "made of finite numbers")
    if isinstance(value, int):
        return value.bit_length() // 4
    if isinstance(value, dict):
        return sum(map(len, cast("dict[str, object]", value)))
    return len(value) if isinstance(value, str) else 0

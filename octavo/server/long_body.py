"""JSON of long bodies, parsed beside the event loop and in slices.

A parser holds Python's lock while it works, 0.1 s for a million numbers, so that a thread alone would help nobody. Long
flat lists and objects of numbers (token ids, biases) are what makes honest bodies long: they are cut out, parsed slice
by slice, and put back in. What is left is bounded by what one go over it may take. Knows no field.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from pydantic_core import from_json

from octavo.errors import InvalidRequestError

MIN_RUN_BYTES = 1024
"""Shorter lists of numbers stay where they are."""
SLICE_BYTES = 128 * 1024
"""A few milliseconds of parsing."""
MAX_SHORT = 300_000
"""Of a body with more short lists than this, no long ones are looked for behind them."""
MARK_DIGITS = 31
MAX_SEPARATORS = 2_000_000
MAX_COLONS = 300_000
"""Of what is left: a key of an object costs ten times what a number does."""
_NUMBERS = b"0123456789+-.eE, \t\r\n"
_KEYS = _NUMBERS + b'":'


@dataclass(frozen=True, slots=True)
class _Run:
    """A flat list or object of numbers: ``body[start:end]``, brackets included."""

    start: int
    end: int
    value: list[Any] | dict[str, Any]


def parse_long_json(body: bytes) -> Any:
    """The value of a JSON text, as ``from_json`` makes it; for a thread.

    Raises:
        ValueError: It is none, or holds NaN or Infinity.
        InvalidRequestError: It has too many values, lists and objects of numbers aside.
    """
    runs = list(_find_runs(body))
    while True:
        mark = 10 ** (MARK_DIGITS - 1) + secrets.randbits(64) * 10**6  # a number that no body has by chance
        rest = _without(body, runs, mark)
        _check_size(rest)
        value = from_json(rest, allow_inf_nan=False, cache_strings="keys")
        value, found = _put_back(value, runs, mark)
        if len(found) == len(runs):
            return value
        runs = [run for index, run in enumerate(runs) if index in found]  # others are part of a text


def _find_runs(body: bytes) -> list[_Run]:
    """In their order; they do not overlap."""
    found = [*_runs_between(body, b"[", b"]", _NUMBERS), *_runs_between(body, b"{", b"}", _KEYS)]
    return sorted(found, key=lambda run: run.start)


def _runs_between(body: bytes, opening: bytes, closing: bytes, allowed: bytes) -> Iterator[_Run]:
    num_short = at = 0
    while num_short < MAX_SHORT and (at := body.find(opening, at)) >= 0:
        end = body.find(closing, at) + 1
        if not end:
            return
        start = body.rfind(opening, at, end)
        if end - start < MIN_RUN_BYTES:
            num_short += 1
        elif _is_made_of(body, start + 1, end - 1, allowed):
            value = _in_slices(body, start, end)
            if value is not None:
                yield _Run(start, end, value)
        at = end


def _is_made_of(body: bytes, start: int, end: int, allowed: bytes) -> bool:
    return not any(
        body[at : min(at + SLICE_BYTES, end)].translate(None, allowed) for at in range(start, end, SLICE_BYTES)
    )


def _in_slices(body: bytes, start: int, end: int) -> list[Any] | dict[str, Any] | None:
    """The list or object between two brackets; None where it is none, which is for the parser of the whole to tell."""
    opening, closing = body[start : start + 1], body[end - 1 : end]
    items: list[Any] = []
    table: dict[str, Any] = {}
    at = start + 1
    while at < end:
        cut = body.find(b",", at + SLICE_BYTES, end - 1)
        cut = end - 1 if cut < 0 else cut
        try:
            part: Any = from_json(opening + body[at:cut] + closing, allow_inf_nan=False)
        except ValueError:
            return None
        if not part:
            return None  # a comma too many
        if isinstance(part, dict):
            table.update(cast("dict[str, Any]", part))
        else:
            items += part
        at = cut + 1
    return items if opening == b"[" else table


def _without(body: bytes, runs: list[_Run], mark: int) -> bytes:
    """``body`` with a short list or object in the place of each run, which holds ``mark`` plus its index."""
    if not runs:
        return body
    pieces: list[bytes] = []
    at = 0
    for index, run in enumerate(runs):
        stub = b"[%d]" if isinstance(run.value, list) else b'{"%d":0}'
        pieces += (body[at : run.start], stub % (mark + index))
        at = run.end
    pieces.append(body[at:])
    return b"".join(pieces)


def _put_back(value: Any, runs: list[_Run], mark: int) -> tuple[Any, set[int]]:
    """``value`` with the runs where their stubs were, and which of them were found."""
    root: list[Any] = [value]
    found: set[int] = set()
    waiting: list[Any] = [root]
    while waiting and len(found) < len(runs):
        holder: Any = waiting.pop()
        is_table = isinstance(holder, dict)
        entries = list(cast("dict[str, Any]", holder).items() if is_table else enumerate(cast("list[Any]", holder)))
        for place, each in entries:
            if not isinstance(each, dict | list):
                continue
            each = cast("dict[str, Any] | list[Any]", each)
            inner: Any = next(iter(each)) if len(each) == 1 else None
            index = _index_of(inner, mark)
            if index is not None and index < len(runs):
                holder[place] = runs[index].value
                found.add(index)
            else:
                waiting.append(each)
    return root[0], found


def _index_of(stub: object, mark: int) -> int | None:
    """Of the run behind the only item or key of a list or object."""
    number = int(stub) if isinstance(stub, str) and len(stub) == MARK_DIGITS and stub.isdecimal() else stub
    return number - mark if isinstance(number, int) and number >= mark else None


def _check_size(rest: bytes) -> None:
    counts = dict.fromkeys((b",", b":", b"[", b"{"), 0)
    for at in range(0, len(rest), SLICE_BYTES):
        for each in counts:
            counts[each] += rest.count(each, at, at + SLICE_BYTES)
    if sum(counts.values()) <= MAX_SEPARATORS and counts[b":"] <= MAX_COLONS:
        return
    refusal = InvalidRequestError(
        f"beside long lists of numbers the body has more than {MAX_SEPARATORS:,} commas, colons and brackets, or more "
        f"than {MAX_COLONS:,} colons (those in texts are counted too): send it in several requests"
    )
    refusal.code = "body_too_complex"
    raise refusal

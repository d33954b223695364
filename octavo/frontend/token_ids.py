"""Token ids that come from outside: a list of integers, then integers of the vocabulary. Knows no lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from octavo.errors import InvalidRequestError

SLICE = 1 << 16
"""A few milliseconds of looking."""


def as_token_ids(prompt: object, param: str) -> list[int]:
    """A prompt as a list; its items are not looked at.

    Raises:
        InvalidRequestError: It is no sequence, or empty.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | str):
        raise InvalidRequestError(
            f"{param} is a {type(prompt).__name__}, but must be a string, a list of token ids, or a dict with "
            "prompt or prompt_token_ids",
            param=param,
        )
    ids = list(cast("Sequence[int]", prompt))
    if not ids:
        raise InvalidRequestError(f"{param} is empty; it needs at least one token id", param=param)
    return ids


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Look at each item; after the length was checked, because this takes time for each. Those that are right, as
    nearly all are, are gone through without a line of Python for each.

    Raises:
        InvalidRequestError: One is no integer in ``[0, vocab_size)``; says which.
    """
    if all_in_range(ids, vocab_size):
        return
    for position, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param}[{position}] is {str(token_id)[:40]}, but must be a token id: an integer in [0, {vocab_size})",
                param=param,
            )


def all_in_range(ids: Sequence[object], end: int) -> bool:
    """Whether all are integers (no bool is) in ``[0, end)``. Goes by slices, so that another thread is let in."""
    for start in range(0, len(ids), SLICE):
        part = ids[start : start + SLICE]
        if set(map(type, part)) != {int}:
            return False
        numbers = cast("Sequence[int]", part)
        if min(numbers) < 0 or max(numbers) >= end:
            return False
    return True

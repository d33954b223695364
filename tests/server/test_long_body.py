"""Long bodies are parsed in slices: the same values as in one go, the same refusals, bounded work."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from pydantic_core import from_json

from octavo.errors import InvalidRequestError
from octavo.server import long_body
from octavo.server.body import INLINE_BYTES, parse_json
from octavo.server.long_body import parse_long_json

RNG = random.Random(3)
IDS = [RNG.randrange(49152) for _ in range(3000)]
TEXT = json.dumps(IDS)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": IDS},
        {"prompt": [IDS, IDS[:700], [1], []], "n": 2},
        [IDS, {"a": {"b": [{"c": IDS}]}}],
        IDS,
        {"logit_bias": {str(each): each / 7 for each in IDS}, "prompt": "x"},
        {"prompt": f"{TEXT} and {TEXT}", "ids": IDS},  # one that looks like a list, and is a part of a text
        {"prompt": [f'say "{TEXT}"', "[" * 3000, "]" * 3000]},
        {"a": [-1.5e3, 2, 1e-4] * 1000, "b": {}, "c": [[[]]], "d": None},
        {"a": [[1, 2], *[IDS] * 3, {"1": 2}], "a2": {"k" * 2000: [1]}},
        {"a": [10**40] * 100},
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", " :\t")])
@pytest.mark.parametrize("slice_bytes", [64, 1000, 1 << 20])
def test_the_same_as_in_one_go(
    value: Any, separators: tuple[str, str], slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_body, "SLICE_BYTES", slice_bytes)
    body = json.dumps(value, separators=separators).encode()
    found = parse_long_json(body)
    assert found == value == from_json(body)
    assert repr(found) == repr(value), "an integer stays one"


@pytest.mark.parametrize(
    "broken",
    [
        TEXT[:-1], TEXT[:-1] + ",]", "[," + TEXT[1:], TEXT.replace(", ", ",, ", 1), TEXT.replace("[", "[01, ", 1),
        TEXT + "]",
        TEXT.replace(", ", ", NaN, ", 1), TEXT.replace(", ", " ", 1), "[" + TEXT,
        '{"1": 2, ' * 2000, '{"a": ' + TEXT + ', "a"}', TEXT.replace(", ", ", +1, ", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slice_bytes", [64, 1 << 20])
def test_what_is_no_json_stays_none(broken: str, slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_body, "SLICE_BYTES", slice_bytes)
    for body in (broken.encode(), b'{"prompt": ' + broken.encode() + b"}"):
        with pytest.raises(ValueError, match="at line"):
            parse_long_json(body)


def test_cuts_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_body, "MIN_RUN_BYTES", 4)
    body = json.dumps({"p": [[1, 22, 333], [4], 5], "b": {"1": 1, "22": -2}, "t": "[1, 2, 3, 4]"}).encode()
    for size in range(1, 20):
        monkeypatch.setattr(long_body, "SLICE_BYTES", size)
        assert parse_long_json(body) == from_json(body)


def test_too_many_values_are_told_without_parsing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_body, "MAX_COLONS", 1000)
    monkeypatch.setattr(long_body, "MAX_SEPARATORS", 5000)
    ids = [7] * (INLINE_BYTES // 2)
    for rest in ({f"k{index}": "" for index in range(1001)}, [True] * 5001, [[]] * 5001, ["a,b:c"] * 1500):
        with pytest.raises(InvalidRequestError, match="several requests") as caught:
            parse_json(json.dumps({"prompt": ids, "x": rest}).encode())
        assert caught.value.code == "body_too_complex"
    few = {"prompt": ids, "x": {f"k{index}": "" for index in range(500)}}
    assert parse_json(json.dumps(few).encode()) == few


def test_a_long_body_that_is_no_object_is_told() -> None:
    for body, code in (
        (b"[" + b"1," * INLINE_BYTES + b"1]", "invalid_type"),
        (b"{" + b" " * INLINE_BYTES, "invalid_json"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            parse_json(body)
        assert caught.value.code == code

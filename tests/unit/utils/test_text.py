"""Numbers as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.utils.text import (
    did_you_mean,
    format_bytes,
    format_seconds,
    nearest_match,
    parse_count,
    plural,
    shorten,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-1", -1), ("4_096", 4096), (" 7 ", 7), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("0.1M", None),
     ("0.1m", 100_000), ("-0.5k", -500), ("-2K", -2048), ("3g", 3 * 10**9), ("3G", 3 * 2**30), ("1T", 2**40),
     ("1.5", None), ("1.5K", None), ("k", None), ("", None), ("1kk", None), ("1e3", None), ("٣", None),
     ("9" * 5000, None)],
)  # fmt: skip
def test_parse_count(text: str, value: int | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="an integer"):
            parse_count(text)
    else:
        assert parse_count(text) == value


@given(st.text(max_size=30))
def test_parse_count_gives_an_integer_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(parse_count(text), int)
    except ValueError as error:
        assert "an integer" in str(error)


def test_formats() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 10 * 2**20, 4 * 2**30, 3 * 2**40, 5 * 2**50)] == [
        "0 B", "1023 B", "1.50 KiB", "10.0 MiB", "4.00 GiB", "3.00 TiB", "5120 TiB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0.0009, 0.0123, 1.234, 12.34, 125)] == [
        "0.9 ms", "12 ms", "1.23 s", "12.3 s", "2 min 5 s",
    ]  # fmt: skip
    assert [plural(n, "token") for n in (0, 1, 2000)] == ["0 tokens", "1 token", "2,000 tokens"]
    assert shorten("x" * 100, 10) == "xxxxxxx..."


def test_nearest_match_is_near_or_nothing() -> None:
    assert nearest_match("max-model-length", ["max-model-len", "max-num-seqs"]) == "max-model-len"
    assert nearest_match("zzzzzz", ["max-model-len"]) is None
    assert did_you_mean("fcsf", ["fcfs", "fair"]) == " Did you mean fcfs?"
    assert did_you_mean("x" * 10**6, ["fcfs"]) == ""

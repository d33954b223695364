"""Stop strings and held-back text, against a reference that sees the whole text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.frontend.detokenizer import Detokenizer, find_stop
from octavo.frontend.tokenizer import Tokenizer


class Pieces:
    """A stream whose token i is the text ``pieces[i]``."""

    def __init__(self, pieces: list[str], end: str = "") -> None:
        self.pieces = pieces
        self.end = end

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[token_id] for token_id in token_ids)

    def flush(self) -> str:
        return self.end


def reference(pieces: list[str], stops: list[str], include: bool, min_tokens: int) -> tuple[str, str | None, int]:
    """Text, stop string and number of tokens, by trying every end position of the whole text in turn."""
    text = "".join(pieces)
    ends_of_tokens = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    free = ends_of_tokens[min_tokens - 1] if 0 < min_tokens <= len(pieces) else (len(text) if min_tokens else 0)
    for end in range(free + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                tokens = next(i + 1 for i, token_end in enumerate(ends_of_tokens) if token_end >= end)
                return text[: end if include else end - len(stop)], stop, tokens
    return text, None, len(pieces)


@given(
    pieces=st.lists(st.text("ab#\n", max_size=4), min_size=1, max_size=20),
    stops=st.lists(st.text("ab#\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 8),
    step=st.integers(1, 3),
)
@settings(max_examples=300)
def test_stop_strings_equal_the_reference(
    pieces: list[str], stops: list[str], include: bool, min_tokens: int, step: int
) -> None:
    """Red when a stop across a border is missed, a split changes the winner, held text leaks, or ids and text part."""
    expected_text, expected_stop, expected_tokens = reference(pieces, stops, include, min_tokens)
    detokenizer = Detokenizer(Pieces(pieces), stops, include_stop=include, min_tokens=min_tokens)
    deltas: list[str] = []
    stop = None
    for start in range(0, len(pieces), step):
        stop = detokenizer.push(range(start, min(start + step, len(pieces))))
        if stop is not None:
            break
        deltas.append(detokenizer.take_delta())
        shown = "".join(deltas)
        assert detokenizer.text() == shown
        assert expected_text.startswith(shown)
    if stop is None:
        assert detokenizer.finish() is None
    deltas.append(detokenizer.take_delta())
    assert stop == expected_stop
    assert "".join(deltas) == detokenizer.text() == expected_text
    assert len(detokenizer.token_ids) == expected_tokens


def test_text_is_held_back_by_the_longest_stop_less_one() -> None:
    detokenizer = Detokenizer(Pieces(["abcdef", "g"]), ["x", "12345"])
    detokenizer.push([0])
    assert detokenizer.take_delta() == "ab"
    detokenizer.push([1])
    assert detokenizer.take_delta() == "c"
    assert detokenizer.finish() is None
    assert detokenizer.take_delta() == "defg"


def test_nothing_is_held_back_when_the_stop_stays() -> None:
    detokenizer = Detokenizer(Pieces(["abcdef", "12", "345 more"]), ["12345"], include_stop=True)
    detokenizer.push([0])
    assert detokenizer.take_delta() == "abcdef"
    assert detokenizer.push([1, 2]) == "12345"
    assert detokenizer.text() == "abcdef12345"


def test_tokens_behind_a_stop_are_dropped() -> None:
    detokenizer = Detokenizer(Pieces(["a", "b#", "c", "d"]), ["#"])
    assert detokenizer.push([0, 1, 2, 3]) == "#"
    assert detokenizer.token_ids == [0, 1]
    assert detokenizer.text() == "ab"


def test_the_last_id_of_a_stopped_answer_gives_no_text() -> None:
    detokenizer = Detokenizer(Pieces(["a", "<end>"]), [])
    detokenizer.push([0, 1], hide_last=True)
    detokenizer.finish()
    assert detokenizer.token_ids == [0, 1]
    assert detokenizer.text() == "a"


def test_without_a_stream_there_are_only_ids() -> None:
    detokenizer = Detokenizer(None)
    assert detokenizer.push([5, 6]) is None
    assert detokenizer.finish() is None
    assert (detokenizer.token_ids, detokenizer.text(), detokenizer.take_delta()) == ([5, 6], "", "")


def test_the_stop_that_ends_first_wins_and_the_longer_of_two() -> None:
    found = find_stop("xxabcyy", ["bcy", "c", "abc"])
    assert found is not None
    assert (found.stop, found.start, found.end) == ("abc", 2, 5)


@pytest.mark.parametrize("stop", ["世界", "界", "🤷🏽", "café"])
def test_a_stop_of_several_bytes_is_found_in_real_tokens(byte_level: Tokenizer, stop: str) -> None:
    text = "the café 世界 🤷🏽‍♀️ end"
    detokenizer = Detokenizer(byte_level.stream(), [stop])
    ids = byte_level.encode(text, add_special_tokens=False)
    assert next(found for i in ids if (found := detokenizer.push([i]))) == stop
    assert detokenizer.text() == text[: text.index(stop)]

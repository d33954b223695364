"""The text of one answer as its ids arrive: stop strings found across token borders, text held back before them.

Text comes from a ``TextStream`` (``text_stream.py``), which never gives half a character. Knows no requests: next is
``output_processor.py``.

Which stop string wins does not depend on how the text was cut into tokens: the one whose last character comes first,
and of those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.frontend.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop string stands in the whole text."""

    stop: str
    start: int
    end: int


def find_stop(text: str, stops: Sequence[str], from_end: int = 0) -> StopMatch | None:
    """The stop string of ``text`` that is complete first.

    Args:
        text: The text to look at.
        stops: Non-empty strings.
        from_end: Matches that end at or before this position do not count.
    """
    best: StopMatch | None = None
    for stop in stops:
        start = text.find(stop, max(0, from_end - len(stop) + 1))
        if start < 0:
            continue
        end = start + len(stop)
        if best is None or (end, start) < (best.end, best.start):
            best = StopMatch(stop, start, end)
    return best


class Detokenizer:
    """Text and ids of one answer.

    Args:
        stream: Where text comes from; None (``detokenize=False``) keeps the text empty.
        stops: Stop strings.
        include_stop: Whether the stop string stays in the text; nothing is held back then.
        min_tokens: A stop string that is complete within so many tokens does not count.
    """

    def __init__(
        self,
        stream: TextStream | None,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.token_ids: list[int] = []
        self._stream = stream
        self._stops = list(stops) if stream is not None else []
        self.has_stops = bool(self._stops)
        """Whether ``push`` can end the answer."""
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        longest = max(map(len, self._stops), default=1)
        self._held = 0 if include_stop else longest - 1
        self._parts: list[str] = []
        """All text; joined into one when it is looked at."""
        self._length = 0
        """Characters in ``_parts``; kept only where stop strings are looked for."""
        self._tail = ""
        """The last ``longest - 1`` characters: all that a match in new text can reach back to."""
        self._tail_length = longest - 1
        self._fresh: list[str] = []
        """What ``take_delta`` has not returned yet."""
        self._done = False

    def push(self, token_ids: Sequence[int], *, hide_last: bool = False) -> str | None:
        """Append ids and their text.

        Args:
            token_ids: New ids. After a stop string, those behind it are dropped.
            hide_last: The last id ended the answer (end-of-sequence, stop id): kept as id, left out of the text.

        Returns:
            The stop string that ended the answer, or None. Nothing may be pushed after one.
        """
        assert not self._done, "the answer has ended"
        stream = self._stream
        if stream is None:
            self.token_ids.extend(token_ids)
            return None
        if not self._stops:
            self.token_ids.extend(token_ids)
            text = stream.push(token_ids[:-1] if hide_last else token_ids)
            if text:
                self._parts.append(text)
                self._fresh.append(text)
            return None
        num_shown = len(token_ids) - 1 if hide_last else len(token_ids)
        for position, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if position < num_shown:
                stop = self._append(stream.push((token_id,)))
                if stop is not None:
                    return stop
        return None

    def finish(self) -> str | None:
        """End the answer: give out what the stream and the hold still have.

        Returns:
            A stop string that only the last bytes completed, or None.
        """
        stop = None
        if self._stream is not None and not self._done:
            stop = self._append(self._stream.flush())
        self._done = True
        return stop

    def text(self) -> str:
        """All text that may be shown by now."""
        whole = self._joined()
        return whole if self._done or not self._held else whole[: max(0, len(whole) - self._held)]

    def take_delta(self) -> str:
        """Text that may be shown and that no earlier call returned."""
        fresh = self._fresh
        if not fresh:
            return ""
        text = fresh[0] if len(fresh) == 1 else "".join(fresh)
        if self._done or not self._held:
            fresh.clear()
            return text
        cut = max(0, len(text) - self._held)
        self._fresh = [text[cut:]]
        return text[:cut]

    def _joined(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def _append(self, text: str) -> str | None:
        if not text:
            return None
        self._parts.append(text)
        self._fresh.append(text)
        if not self._stops:
            return None
        window = self._tail + text
        offset = self._length - len(self._tail)
        self._length += len(text)
        if len(self.token_ids) > self._min_tokens:
            match = find_stop(window, self._stops, len(self._tail))
            if match is not None:
                end = offset + (match.end if self._include_stop else match.start)
                fresh = "".join(self._fresh)
                self._fresh = [fresh[: len(fresh) - (self._length - end)]]
                self._parts = [self._joined()[:end]]
                self._length = end
                self._done = True
                return match.stop
        self._tail = window[max(0, len(window) - self._tail_length) :]
        return None

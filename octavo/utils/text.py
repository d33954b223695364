"""Numbers and names as people write and read them: ``16K``, ``1.5 GiB``, "did you mean". Knows nothing about models.

Suffixes follow vLLM: lower case is decimal (``1k`` = 1000), upper case binary (``1K`` = 1024), and only a decimal one
may follow a fraction (``25.6k``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_COUNT = re.compile(r"([+-]?\d[\d_]*)(\.\d+)?([kKmMgGtT]?)", re.ASCII)
_EXPONENTS = {"k": 1, "m": 2, "g": 3, "t": 4}
MAX_DIGITS = 20
"""Longer numbers mean nothing here, and ``int()`` refuses those beyond 4300 digits anyway."""


def parse_count(text: str) -> int:
    """An integer from ``4096``, ``4_096``, ``4k``, ``25.6k``, ``4K``, ``2G`` or ``-1``.

    Raises:
        ValueError: Not such a number; the message says what is possible.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None or len(text) > MAX_DIGITS:
        raise ValueError("an integer, or one with a suffix: 4k is 4000, 4K is 4096, likewise m/M, g/G, t/T")
    whole, fraction, suffix = match.group(1), match.group(2) or "", match.group(3)
    if not suffix:
        if fraction:
            raise ValueError("an integer (a fraction needs a decimal suffix, such as 25.6k)")
        return int(whole)
    exponent = _EXPONENTS[suffix.lower()]
    if suffix.isupper():
        if fraction:
            raise ValueError(f"an integer before {suffix} (binary); a fraction goes with {suffix.lower()} (decimal)")
        return int(whole) * 1024**exponent
    # In integers, so that 25.6k is exactly 25600.
    digits = fraction[1:]
    scale = 10 ** (3 * exponent)
    value = abs(int(whole)) * scale + (int(digits) * scale // 10 ** len(digits) if digits else 0)
    return -value if whole.startswith("-") else value


def format_count(value: int) -> str:
    """``12,345``."""
    return f"{value:,}"


def format_bytes(num_bytes: float) -> str:
    """Binary units with three digits that count: ``512 B``, ``1.50 MiB``, ``12.3 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def format_seconds(seconds: float) -> str:
    """``0.9 ms``, ``123 ms``, ``1.23 s``, ``12.3 s`` or ``2 min 5 s``."""
    if seconds < 1:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
    if seconds < 60:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def plural(count: int, noun: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shorten(text: str, width: int = 80) -> str:
    """At most ``width`` characters, cut in the end with an ellipsis."""
    return text if len(text) <= width else text[: width - 3] + "..."


def nearest_match(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a misspelt ``name`` most likely meant, or None when nothing is close."""
    matches = difflib.get_close_matches(name[:64], list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """`` Did you mean --max-model-len?`` with a leading blank, or nothing."""
    match = nearest_match(name, candidates)
    return f" Did you mean {prefix}{match}?" if match else ""


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"

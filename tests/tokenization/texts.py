"""2,000 texts in 20 scripts, with emoji, control characters, odd spaces, digits, code and marks mixed in."""

from __future__ import annotations

import random
import unicodedata
from functools import cache

SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0x61, 0x7A), (0xC0, 0x17F)),
    "cyrillic": ((0x410, 0x44F), (0x400, 0x45F)),
    "greek": ((0x391, 0x3C9), (0x1F00, 0x1FFF)),
    "arabic": ((0x621, 0x64A), (0x64B, 0x652), (0x660, 0x669)),
    "hebrew": ((0x5D0, 0x5EA), (0x5B0, 0x5BD)),
    "devanagari": ((0x904, 0x939), (0x93A, 0x94F), (0x966, 0x96F)),
    "bengali": ((0x985, 0x9B9), (0x9BE, 0x9CD)),
    "tamil": ((0xB85, 0xBB9), (0xBBE, 0xBCD)),
    "telugu": ((0xC05, 0xC39), (0xC3E, 0xC4D)),
    "sinhala": ((0xD85, 0xDC6), (0xDCA, 0xDDF)),
    "thai": ((0xE01, 0xE30), (0xE31, 0xE4E)),
    "lao": ((0xE81, 0xEB0), (0xEB1, 0xECD)),
    "georgian": ((0x10D0, 0x10FA), (0x10A0, 0x10C5)),
    "armenian": ((0x531, 0x556), (0x561, 0x587)),
    "ethiopic": ((0x1200, 0x135A),),
    "khmer": ((0x1780, 0x17B3), (0x17B6, 0x17D3)),
    "hangul": ((0xAC00, 0xD7A3), (0x1100, 0x1112)),
    "kana": ((0x3041, 0x3096), (0x30A1, 0x30FA), (0xFF66, 0xFF9D)),
    "han": ((0x4E00, 0x9FFF), (0x4E00, 0x4FFF), (0x3400, 0x4DBF), (0x20000, 0x200FF)),
    "math": ((0x2200, 0x22FF), (0x1D400, 0x1D7FF), (0x2460, 0x24FF), (0xFF10, 0xFF5A)),
}
EMOJI = [
    "😀", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "❤️", "1️⃣", "🧑🏿‍🚀", "©️", "⛹🏻‍♀️",
]  # fmt: skip
ODD = [
    "\x00", "\x01", "\x07", "\x08", "\x0b", "\x0c", "\x1b[31m", "\x7f", "\x85", "\xa0", "\xad", "\u200b", "\u200d",
    "\u200e", "\u2028", "\u2029", "\u202e", "\u2060", "\u3000", "\ufeff", "\ufffd", "\ufffe", "\U000e0001",
    "\U0010ffff", "e\u0301", "a\u0308\u0323", "ﬁ", "Å", "ſ", "İ", "ß", "½", "Ⅷ", "\u0345",
]  # fmt: skip
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "\n  "]
MIXED = [
    "123", "1234567", "3.14159", "2024-11-22", "don't", "I'LL we've THEY'RE", "'s'T", "x==y;", "def f(x):\n\treturn x",
    "{\"a\": [1, 2]}", "https://example.org/a?b=c#d", "user@host", "C++", "a_b-c", "...", "!!!", "¿qué?", "—", "“q”",
    "<b>", "$5", "#tag", "a/b", "\\n", "████", "======", "-----", "xxxxxxxxxxxx", "ABCdefGHI", "iPhone15Pro",
]  # fmt: skip
TEXTS_PER_SCRIPT = 100


@cache
def _letters(script: str) -> tuple[str, ...]:
    """Assigned characters of a script."""
    codes = (code for low, high in SCRIPTS[script] for code in range(low, high + 1))
    return tuple(chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn")


def _word(rng: random.Random, script: str) -> str:
    chance = rng.random()
    if chance < 0.08:
        return rng.choice(EMOJI)
    if chance < 0.16:
        return rng.choice(ODD)
    if chance < 0.30:
        return rng.choice(MIXED)
    if chance < 0.36:
        return "".join(rng.choice(_letters("latin")) for _ in range(rng.randint(1, 9)))
    return "".join(rng.choice(_letters(script)) for _ in range(rng.randint(1, 9)))


@cache
def sample_texts() -> tuple[str, ...]:
    """The texts; the same in every run."""
    rng = random.Random(20)
    texts = ["", " ", "  ", "\n", " a", "a ", "  a  b  ", "\ta", "\u2581a"]
    for script in SCRIPTS:
        for _ in range(TEXTS_PER_SCRIPT):
            parts: list[str] = []
            for _ in range(rng.randint(1, 14)):
                parts.append(_word(rng, script))
                parts.append(rng.choice(SPACES) if rng.random() < 0.7 else "")
            texts.append("".join(parts))
    return tuple(texts)

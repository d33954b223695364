"""What may be written to a terminal."""

from __future__ import annotations

import re
from typing import IO, Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str, stream: IO[Any]) -> str:
    """``text`` without control characters when ``stream`` is a terminal: a model may write escape sequences, which
    would move the cursor or worse. Pipes and files get the text as it is."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text

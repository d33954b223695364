"""GGUF models in several files: ``name-00001-of-00003.gguf`` and so on, as llama.cpp's ``gguf-split`` names them.

Knows names only. What each part says of itself is checked by ``gguf_file.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from octavo.errors import CheckpointError

MAX_PARTS = 1024
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_NAMED = 8


def parts_of(path: Path) -> list[Path]:
    """All files of the model that ``path`` is a part of, in order; ``path`` alone for one in a single file.

    Raises:
        CheckpointError: A part is not beside it; names those that are missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise CheckpointError(str(path), f"is named as part {match['number']} of {count}; there are 1 to {MAX_PARTS}")
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if part != path and not part.is_file()]
    if missing:
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        names = f"{', '.join(missing[:_MAX_NAMED])}{more}"
        raise CheckpointError(str(path), f"is one of {count} parts, but these are not beside it: {names}")
    return parts


def one_each(files: Iterable[Path]) -> list[Path]:
    """One file for each model: of one in parts the first that is there. In order of names."""
    models: dict[tuple[Path, str, str], Path] = {}
    for path in sorted(files):
        match = _PART.fullmatch(path.name)
        models.setdefault((path.parent, match["stem"], match["count"]) if match else (path, "", ""), path)
    return list(models.values())

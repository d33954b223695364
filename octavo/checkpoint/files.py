"""Small readers for files inside a model folder: bounded JSON and text, the rule about links, mapped pages.

Knows nothing of what the files mean. Every error is a ``CheckpointError`` that names the file.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, cast

from octavo.errors import CheckpointError

MAX_CONFIG_BYTES = 32 << 20
MAX_TOKENIZER_BYTES = 512 << 20


def resolve_in_folder(path: Path) -> Path:
    """Return ``path`` with links resolved, refusing a link that leads out of the model.

    The hub cache keeps files as links from ``snapshots/<commit>/`` to ``blobs/`` beside it: that is inside.
    """
    try:
        folder = path.parent.resolve(strict=True)
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(str(path), f"cannot be opened: {exc}") from exc
    root = folder
    for inner in (folder, folder.parent):  # a model's folder in the cache, or a folder in it
        if inner.parent.name == "snapshots":
            root = inner.parent.parent
    if not target.is_relative_to(root):
        raise CheckpointError(str(path), "is a symbolic link out of the model folder; put the file itself there")
    if not target.is_file():
        raise CheckpointError(str(path), "is not a regular file")
    return target


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file of at most ``max_bytes``."""
    target = resolve_in_folder(path)
    try:
        size = target.stat().st_size
        if size > max_bytes:
            raise CheckpointError(str(path), f"has {size} bytes, more than the {max_bytes} allowed for such a file")
        return target.read_bytes()
    except OSError as exc:
        raise CheckpointError(str(path), f"cannot be read: {exc}") from exc


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file of at most ``max_bytes``."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CheckpointError(str(path), f"is not UTF-8: {exc}") from exc


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file whose top level is an object."""
    return parse_json_object(read_text(path, max_bytes), str(path))


def parse_json_object(text: str, file: str) -> dict[str, Any]:
    """Parse ``text`` as one JSON object; a name that occurs twice is an error, since readers would disagree on it."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise CheckpointError(file, f"holds the name {name[:100]!r} twice")
                seen.add(name)
        return result

    try:
        value: Any = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, CheckpointError):
            raise
        raise CheckpointError(file, f"is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(file, f"must hold a JSON object, not {type(value).__name__}")
    return cast("dict[str, Any]", value)


def drop_pages(mapped: mmap.mmap, start: int, num_bytes: int) -> None:
    """Take the pages of a byte range of a file out of the resident set, where the system can."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = min(start + num_bytes, len(mapped)) - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)

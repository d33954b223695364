"""Input of ``octavo run-batch``: OpenAI's batch format, one request per line, checked one by one.

The file is read once to index it (32 to 300 bytes of memory per row), and each row again when its turn comes, so that a
file may be larger than memory. Rows are put in an order in which those with a common beginning follow each other: the
engine's prefix cache then computes that beginning once. Knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from octavo.errors import ConfigError
from octavo.utils.text import shorten

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_ROW_BYTES = 64 * 2**20
_PIECE_CHARS, _MAX_PIECES = 64, 64
"""Beginnings are compared in pieces of this many characters, up to this many pieces."""


class BadRowError(Exception):
    """A row that cannot be asked; its message is for the row's owner.

    Args:
        code: Stable name.
        message: What is wrong with it.
        custom_id: The row's, if it has a usable one.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request."""

    custom_id: str
    endpoint: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where a row stands."""

    line: int
    """From 0."""
    offset: int
    size: int
    """Bytes, without the newline."""
    key: bytes
    """Rows whose keys have a common beginning have a common beginning themselves."""
    is_duplicate: bool
    """Another row before it has its ``custom_id``."""


class BatchFile:
    """An input file.

    Args:
        path: JSON lines in UTF-8. Empty lines are passed over.

    Raises:
        ConfigError: It cannot be read, or has no rows.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.rows: list[RowPlace] = []
        digest = hashlib.sha256()
        seen: set[bytes] = set()
        offset = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file):
                    digest.update(line)
                    content = line.rstrip(b"\r\n")
                    if content.strip():
                        self.rows.append(_place(number, offset, content, seen))
                    offset += len(line)
        except OSError as error:
            raise ConfigError(
                f"input_file is {path!r}, which cannot be read: {error.strerror}", param="input_file"
            ) from error
        if not self.rows:
            raise ConfigError(f"input_file is {path!r}, which has no rows", param="input_file")
        self.digest = digest.hexdigest()

    def in_order_of_prefix(self) -> list[RowPlace]:
        """Rows with a common beginning one after another, otherwise as in the file."""
        first_of: dict[bytes, int] = {}
        for row in self.rows:
            first_of.setdefault(row.key[:8], row.line)
        return sorted(self.rows, key=lambda row: (first_of[row.key[:8]], row.key, row.line))

    def read(self, place: RowPlace) -> BatchRow:
        """One row, checked as far as the format goes; its body is the endpoint's matter.

        Raises:
            BadRowError: It is no request of this format.
        """
        if place.size > MAX_ROW_BYTES:
            raise BadRowError("row_too_large", f"the row has {place.size:,} bytes, but at most {MAX_ROW_BYTES:,} fit")
        with self.path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        return _check(_parse(data), place.is_duplicate)


def _place(number: int, offset: int, content: bytes, seen: set[bytes]) -> RowPlace:
    is_duplicate, key = False, b""
    if len(content) <= MAX_ROW_BYTES:
        try:
            row = _parse(content)
        except BadRowError:
            row = {}
        custom_id = row.get("custom_id")
        if isinstance(custom_id, str):
            mark = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            is_duplicate = mark in seen
            seen.add(mark)
        key = _key(row)
    return RowPlace(number, offset, len(content), key, is_duplicate)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid_json_line", f"the row is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRowError("invalid_json_line", f"the row is a JSON {type(row).__name__}, but must be an object")
    return cast("dict[str, Any]", row)


def _check(row: dict[str, Any], is_duplicate: bool) -> BatchRow:
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadRowError("missing_required_parameter", "custom_id is missing, or not a text")
    if is_duplicate:
        raise BadRowError("duplicate_custom_id", "custom_id was used by a row before this one", custom_id)
    if row.get("method", "POST") != "POST":
        method = shorten(repr(row["method"]), 40)
        raise BadRowError("invalid_method", f"method is {method}, but must be POST", custom_id)
    endpoint = row.get("url")
    if endpoint not in ENDPOINTS:
        shown = shorten(repr(endpoint), 80)
        raise BadRowError("invalid_url", f"url is {shown}, but must be one of {', '.join(ENDPOINTS)}", custom_id)
    body = row.get("body")
    if not isinstance(body, dict):
        raise BadRowError("missing_required_parameter", "body is missing, or not an object", custom_id)
    request = cast("dict[str, Any]", body)
    if request.get("stream"):
        raise BadRowError("invalid_value", "stream is true, but rows of a batch are answered whole", custom_id)
    return BatchRow(custom_id, str(endpoint), request)


def _key(row: dict[str, Any]) -> bytes:
    """A hash per piece of the prompt, one after another."""
    given: Any = row.get("body")
    body = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    asked: Any = body.get("messages", body.get("prompt", body.get("input")))
    text = asked if isinstance(asked, str) else json.dumps(asked)[: _PIECE_CHARS * _MAX_PIECES]
    head = zlib.crc32(f"{row.get('url')} {body.get('model')}".encode("utf-8", "surrogatepass"))
    pieces = [head.to_bytes(4, "big")]
    for start in range(0, min(len(text), _PIECE_CHARS * _MAX_PIECES), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS].encode("utf-8", "surrogatepass")
        pieces.append(zlib.crc32(piece).to_bytes(4, "big"))
    return b"".join(pieces)

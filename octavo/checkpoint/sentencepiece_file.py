"""Reads sentencepiece's ``tokenizer.model``: just enough of protobuf for its pieces and their normalisation.

The file is a protobuf message (``sentencepiece_model.proto`` of https://github.com/google/sentencepiece); every length
is checked against what is left. Knows no special tokens beyond what the file names: ``tokenizer_data.py`` puts those of
``tokenizer_config.json`` over them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.files import read_bytes
from octavo.checkpoint.pieces import BYTE, NORMAL, Pieces
from octavo.errors import CheckpointError

MAX_BYTES = 64 << 20
MAX_PIECES = 4_000_000
UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class SentencePieceFile:
    """What a file says, with protobuf's defaults where it is silent."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    model_type: int = UNIGRAM
    suffix_space: bool = False
    unknown_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    prefix_space: bool = True
    trim_spaces: bool = True
    escape_spaces: bool = True

    def token(self, index: int) -> tuple[str | None, int | None]:
        """(token, id) of one of the ids above; both None when it is -1 or beyond the pieces."""
        return (self.tokens[index], index) if 0 <= index < len(self.tokens) else (None, None)

    def pieces(self, prefix_space: bool | None, prefix_first_only: bool) -> Pieces:
        """The vocabulary; ``prefix_space`` None keeps what the file says."""
        return Pieces(
            tokens=self.tokens,
            scores=self.scores,
            types=self.types,
            unigram=self.model_type == UNIGRAM,
            unknown_id=self.unknown_id,
            charsmap=self.charsmap,
            prefix_space=self.prefix_space if prefix_space is None else prefix_space,
            prefix_first_only=prefix_first_only,
            trim_spaces=self.trim_spaces,
        )


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read and check a ``.model`` file.

    Raises:
        CheckpointError: It is no sentencepiece model, damaged, or of a kind that cannot be rebuilt.
    """
    file = str(path)
    result = SentencePieceFile([], [], [])
    try:
        for field, kind, value in _fields(read_bytes(path, MAX_BYTES)):
            if kind != _BYTES or not isinstance(value, bytes):
                continue
            if field == 1:
                _piece(result, value)
            elif field == 2:
                _trainer(result, value)
            elif field == 3:
                _normalizer(result, value)
    except (ValueError, struct.error) as exc:
        raise CheckpointError(file, f"is no sentencepiece model that can be read: {exc}") from exc
    _check(result, file)
    return result


def _check(result: SentencePieceFile, file: str) -> None:
    if not result.tokens:
        raise CheckpointError(file, "is no sentencepiece model: it holds no pieces")
    if result.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(file, f"has the model type {result.model_type}; readable are 1 (unigram) and 2 (BPE)")
    if result.suffix_space or not result.escape_spaces:
        raise CheckpointError(file, "writes spaces in a way (as suffix, or not escaped) that cannot be rebuilt")
    if len(set(result.tokens)) != len(result.tokens):
        raise CheckpointError(file, "holds a piece twice")
    if not 0 <= result.unknown_id < len(result.tokens):
        raise CheckpointError(file, f"has the unk_id {result.unknown_id}, but {len(result.tokens)} pieces")
    if not all(math.isfinite(score) for score in result.scores):
        raise CheckpointError(file, "holds a score that is not a finite number")


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, wire type, value) of a message, in order."""
    position, end = 0, len(data)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= end or shift > 63:
                raise ValueError(f"a number at byte {position} does not end")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < end:
        tag = varint()
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            yield field, kind, varint()
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"unknown wire type {kind} before byte {position}")
        size = varint() if kind == _BYTES else (8 if kind == _FIXED64 else 4)
        if size > end - position:
            raise ValueError(f"a field of {size} bytes at byte {position} reaches past the end")
        yield field, kind, data[position : position + size]
        position += size


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(result: SentencePieceFile, data: bytes) -> None:
    token, score, its_type = "", 0.0, NORMAL
    for field, kind, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            token = value.decode("utf-8")
        elif field == 2 and kind == _FIXED32 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            its_type = value
    if not NORMAL <= its_type <= BYTE:
        raise ValueError(f"piece {len(result.tokens)} has the unknown type {its_type}")
    if len(result.tokens) >= MAX_PIECES:
        raise ValueError(f"it has more than {MAX_PIECES} pieces")
    result.tokens.append(token)
    result.scores.append(score)
    result.types.append(its_type)


def _trainer(result: SentencePieceFile, data: bytes) -> None:
    for field, _, value in _fields(data):
        if not isinstance(value, int):
            continue
        if field == 3:
            result.model_type = value
        elif field == 24:
            result.suffix_space = bool(value)
        elif field == 40:
            result.unknown_id = _signed(value)
        elif field == 41:
            result.bos_id = _signed(value)
        elif field == 42:
            result.eos_id = _signed(value)
        elif field == 43:
            result.pad_id = _signed(value)


def _normalizer(result: SentencePieceFile, data: bytes) -> None:
    for field, _, value in _fields(data):
        if field == 2 and isinstance(value, bytes):
            result.charsmap = value
        elif field == 3 and isinstance(value, int):
            result.prefix_space = bool(value)
        elif field == 4 and isinstance(value, int):
            result.trim_spaces = bool(value)
        elif field == 5 and isinstance(value, int):
            result.escape_spaces = bool(value)

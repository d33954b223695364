"""Tokenizers as tiktoken files: one token a line, in base64, with its rank.

Such a file says nothing of how text is cut and of its special tokens. The cut is known by family, from the name of the
file and the classes that ``tokenizer_config.json`` and ``config.json`` name; special tokens come from
``tokenizer_config.json`` (``added_tokens_decoder``), and those of Llama 3 and Qwen 1, whose files often come without
one, are known. A family that is not known is refused: with another cut, other ids than in training would come out.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from octavo.checkpoint.byte_bpe import LLAMA3_REGEX, O200K_REGEX, QWEN2_REGEX, Cut, tokenizer_from_ranks
from octavo.checkpoint.files import MAX_TOKENIZER_BYTES, read_bytes
from octavo.errors import CheckpointError

MAX_TOKENS = 4_000_000
_LLAMA3_NAMED = {
    "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6,
    "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TiktokenFamily:
    """What a tiktoken file does not say."""

    cut: Cut
    special: Mapping[str, int] = field(default_factory=dict[str, int])
    """Special tokens to ids relative to the first free one; used where no ``added_tokens_decoder`` names any."""
    bos_token: str | None = None
    eos_token: str | None = None


def _llama3_special() -> dict[str, int]:
    named = {index: token for token, index in _LLAMA3_NAMED.items()}
    others = iter(range(256))
    return {named.get(i) or f"<|reserved_special_token_{next(others)}|>": i for i in range(256)}


_QWEN_EXTRAS = {f"<|extra_{i}|>": 3 + i for i in range(205)}
FAMILIES: Mapping[str, TiktokenFamily] = {
    "llama3": TiktokenFamily(
        Cut((LLAMA3_REGEX,), ignore_merges=True, add_bos=True),
        _llama3_special(),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "qwen": TiktokenFamily(
        Cut((QWEN2_REGEX,), ignore_merges=True, nfc=True),
        {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **_QWEN_EXTRAS},
        None,
        "<|endoftext|>",
    ),
    "cl100k": TiktokenFamily(Cut((LLAMA3_REGEX,), ignore_merges=True)),
    "o200k": TiktokenFamily(Cut((O200K_REGEX,), ignore_merges=True)),
}
_BY_FILE = {"qwen.tiktoken": "qwen", "cl100k_base.tiktoken": "cl100k", "o200k_base.tiktoken": "o200k"}
_BY_LLAMA3_SIZE = 128_000
"""Ranks of Llama 3's file, which is called ``tokenizer.model`` like those of sentencepiece."""


@dataclass(frozen=True, slots=True)
class TiktokenTokenizer:
    """What ``read_tiktoken`` returns."""

    tokenizer: Tokenizer
    special: dict[str, int]
    bos_token: str | None
    eos_token: str | None
    add_bos: bool


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins like a tiktoken file: a word of base64, a space, and a number."""
    with path.open("rb") as f:
        word, _, number = f.readline(2048).rstrip(b"\r\n").partition(b" ")
    try:
        return bool(base64.b64decode(word, validate=True)) and number.isdigit()
    except binascii.Error:
        return False


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> TiktokenTokenizer:
    """Read a tiktoken file.

    Args:
        path: The file.
        config: ``tokenizer_config.json``; empty where there is none.

    Raises:
        CheckpointError: The file is damaged, or nothing says how its family cuts text.
    """
    file = str(path)
    ranks = read_ranks(path)
    name = _BY_FILE.get(path.name) or ("llama3" if len(ranks) == _BY_LLAMA3_SIZE else None)
    if name is None:
        raise CheckpointError(
            file,
            "is a tiktoken file of no known family (known: Llama 3's tokenizer.model, "
            f"{', '.join(_BY_FILE)}), so nothing says how text is cut; write a tokenizer.json with transformers",
        )
    family = FAMILIES[name]
    special = _named_tokens(config, file)
    if not special:
        first = max(ranks.values()) + 1
        special = {token: first + index for token, index in family.special.items()}
    try:
        tokenizer = tokenizer_from_ranks(ranks, special, family.cut)
    except ValueError as exc:
        raise CheckpointError(file, str(exc)) from exc
    tokenizer.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]
        [AddedToken(token, special=True, normalized=False) for token in sorted(special, key=special.__getitem__)]
    )
    return TiktokenTokenizer(tokenizer, special, family.bos_token, family.eos_token, family.cut.add_bos)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file and their ranks.

    Raises:
        CheckpointError: A line is not a token in base64 and a rank, or one of them occurs twice.
    """
    file = str(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_TOKENIZER_BYTES).splitlines(), 1):
        if not line:
            continue
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
            value = int(rank)
        except (binascii.Error, ValueError) as exc:
            raise CheckpointError(file, f"line {number} is not a token in base64 and its rank: {exc}") from exc
        if not 0 <= value < MAX_TOKENS or token in ranks:
            raise CheckpointError(file, f"line {number} has a token that was there before, or the rank {value}")
        ranks[token] = value
    if len(set(ranks.values())) != len(ranks) or not ranks:
        raise CheckpointError(file, "holds no tokens, or a rank twice")
    return ranks


def _named_tokens(config: Mapping[str, Any], file: str) -> dict[str, int]:
    """Added tokens of ``tokenizer_config.json`` with their ids."""
    stored = config.get("added_tokens_decoder")
    entries = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    special: dict[str, int] = {}
    for index, item in entries.items():
        entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        token = entry.get("content")
        if not index.isdigit() or not isinstance(token, str):
            raise CheckpointError(
                file, f"added_tokens_decoder has the entry {index!r:.60}, which is no id with content"
            )
        special[token] = int(index)
    return special

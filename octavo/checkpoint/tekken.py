"""Mistral's ``tekken.json``: byte strings by rank, the expression that cuts text, and special tokens in front of them.

Reads the file itself; the package ``mistral-common`` is the reference in tests. Special tokens that the file does not
name have the names that Mistral gives them (``<SPECIAL_20>``), so that every id below the vocabulary size has a token.

Knows no chat template: tekken files carry none, see ``chat_templates.py``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from octavo.checkpoint.byte_bpe import Cut, tokenizer_from_ranks
from octavo.checkpoint.files import MAX_TOKENIZER_BYTES, read_json_object
from octavo.errors import CheckpointError

FILE_NAME = "tekken.json"
MAX_VOCAB = 4_000_000
MAX_PATTERN_CHARS = 4096
_FIRST_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Of files before version 7, which do not list them."""


@dataclass(frozen=True, slots=True)
class TekkenTokenizer:
    """What ``read_tekken`` returns."""

    tokenizer: Tokenizer
    special: dict[str, int]
    hidden: frozenset[int]
    """Special tokens that are control tokens: left out of decoded text on request."""


def read_tekken(path: Path) -> TekkenTokenizer:
    """Read a tekken file.

    Raises:
        CheckpointError: It is damaged, or its numbers contradict each other.
    """
    file = str(path)
    data = read_json_object(path, MAX_TOKENIZER_BYTES)
    settings = data.get("config")
    config = cast("dict[str, Any]", settings) if isinstance(settings, dict) else {}
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN_CHARS:
        raise CheckpointError(file, "config.pattern must be the expression that cuts text")
    size = _size(config, "default_vocab_size", file)
    num_special = _size(config, "default_num_special_tokens", file)
    special, hidden = _special_tokens(data.get("special_tokens"), num_special, file)
    ranks = _ranks(data.get("vocab"), size - num_special, file)
    try:
        cut = Cut((pattern,), ignore_merges=True, add_bos=True)
        tokenizer = tokenizer_from_ranks(ranks, special, cut, offset=num_special)
    except Exception as exc:  # tokenizers raises bare Exception for a pattern that is none
        raise CheckpointError(file, f"holds no vocabulary that can be rebuilt: {exc}") from exc
    tokenizer.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return TekkenTokenizer(tokenizer, special, hidden)


def _size(config: dict[str, Any], name: str, file: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 <= value <= MAX_VOCAB:
        raise CheckpointError(file, f"config.{name} is {value!r:.60}, but must be an integer from 0 to {MAX_VOCAB}")
    return value


def _special_tokens(stored: Any, count: int, file: str) -> tuple[dict[str, int], frozenset[int]]:
    names = [f"<SPECIAL_{index}>" for index in range(count)]
    visible: set[int] = set()
    if stored is None:
        names[: len(_FIRST_SPECIAL)] = _FIRST_SPECIAL[:count]
    elif isinstance(stored, list):
        for item in cast("list[Any]", stored):
            entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
            rank, name = entry.get("rank"), entry.get("token_str")
            if type(rank) is not int or not 0 <= rank < count or not isinstance(name, str) or not name:
                raise CheckpointError(file, f"special_tokens holds {item!r:.100}, which has no rank and token_str")
            names[rank] = name
            if entry.get("is_control") is False:
                visible.add(rank)
    else:
        raise CheckpointError(file, f"special_tokens must be a list, not {type(stored).__name__}")
    special = {name: index for index, name in enumerate(names)}
    if len(special) != count:
        raise CheckpointError(file, "special_tokens holds a token twice")
    return special, frozenset(special.values()) - visible


def _ranks(stored: Any, count: int, file: str) -> dict[bytes, int]:
    """The first ``count`` entries: files hold more than the models use."""
    if not isinstance(stored, list) or len(cast("list[Any]", stored)) < count:
        raise CheckpointError(file, f"vocab must be a list of at least {count} tokens")
    ranks: dict[bytes, int] = {}
    for index, item in enumerate(cast("list[Any]", stored)[: max(0, count)]):
        entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        text = entry.get("token_bytes")
        if entry.get("rank") != index or not isinstance(text, str):
            raise CheckpointError(file, f"vocab entry {index} has no rank {index} and token_bytes")
        try:
            token = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise CheckpointError(file, f"vocab entry {index}: token_bytes is not base64: {exc}") from exc
        ranks[token] = index
    if len(ranks) != count:
        raise CheckpointError(file, "vocab holds a token twice")
    return ranks

"""Tokenizer files that came before ``tokenizer.json``: which one a folder has, and what can be made of it.

Knows the order in which they are looked for, and what ``tokenizer_config.json`` adds to each. The formats are in
``tekken.py``, ``sentencepiece_file.py`` and ``tiktoken_file.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from octavo.checkpoint.chat_templates import is_mistral_file
from octavo.checkpoint.files import read_json_object, resolve_in_folder
from octavo.checkpoint.pieces import CONTROL, build_piece_tokenizer
from octavo.checkpoint.sentencepiece_file import read_sentencepiece
from octavo.checkpoint.tekken import FILE_NAME as TEKKEN_FILE
from octavo.checkpoint.tekken import read_tekken
from octavo.checkpoint.tiktoken_file import is_tiktoken, read_tiktoken
from octavo.errors import CheckpointError

_NAMES = (TEKKEN_FILE, "tokenizer.model")
_PATTERNS = ("tekken*.json", "tokenizer.model.v*", "*.model.v*", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """What a file of its own kind says."""

    tokenizer: Tokenizer
    roles: Mapping[str, str]
    """``bos_token`` and so on, where the file or its family says."""
    special_ids: frozenset[int]
    add_bos: bool


def find_unconverted(folder: Path) -> Path | None:
    """The tokenizer file of a folder without ``tokenizer.json``; None when there is none that can be read.

    Raises:
        CheckpointError: There are several of the same kind, so that it is not clear which one is meant.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:8])
            raise CheckpointError(str(folder), f"holds several tokenizer files: {names}; name one with --tokenizer")
        if found:
            return found[0]
    return None


def is_unconverted(path: Path) -> bool:
    """Whether ``path`` is named like one of the files that ``find_unconverted`` finds."""
    return path.name in _NAMES or any(path.match(pattern) for pattern in _PATTERNS)


def read_unconverted(path: Path, config: Mapping[str, Any]) -> OwnTokenizer:
    """Read one of the files that ``find_unconverted`` finds.

    Args:
        path: The file.
        config: ``tokenizer_config.json`` of its folder; empty where there is none.

    Raises:
        CheckpointError: The file is damaged or of a kind that cannot be rebuilt exactly.
    """
    resolve_in_folder(path)
    if path.suffix == ".json":
        tekken = read_tekken(path)
        roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        return OwnTokenizer(
            tekken.tokenizer, {role: t for role, t in roles.items() if t in tekken.special}, tekken.hidden, add_bos=True
        )
    if path.suffix == ".tiktoken" or is_tiktoken(path):
        made = read_tiktoken(path, config)
        roles = {"bos_token": made.bos_token, "eos_token": made.eos_token}
        return OwnTokenizer(
            made.tokenizer,
            {role: token for role, token in roles.items() if token is not None},
            frozenset(made.special.values()),
            made.add_bos,
        )
    return _sentencepiece(path, config)


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> OwnTokenizer:
    model = read_sentencepiece(path)
    prefix, legacy = config.get("add_prefix_space"), config.get("legacy")
    # The templates for Mistral's own files write the space behind a special token themselves.
    first_only = legacy is False if isinstance(legacy, bool) else is_mistral_file(path)
    pieces = model.pieces(prefix if isinstance(prefix, bool) else None, first_only)
    try:
        tokenizer = build_piece_tokenizer(pieces)
    except ValueError as exc:
        raise CheckpointError(str(path), f"holds no vocabulary that can be rebuilt: {exc}") from exc
    special = {index for index, its in enumerate(model.types) if its == CONTROL}
    special |= _add_named(tokenizer, path.parent, config)
    roles = {
        "bos_token": model.token(model.bos_id)[0],
        "eos_token": model.token(model.eos_id)[0],
        "unk_token": model.token(model.unknown_id)[0],
        "pad_token": model.token(model.pad_id)[0],
    }
    return OwnTokenizer(
        tokenizer,
        {role: token for role, token in roles.items() if token is not None},
        frozenset(special),
        add_bos=True,
    )


def _add_named(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Add the tokens that the folder's JSON files name beside the model's pieces; returns the special ones' ids."""
    stored = config.get("added_tokens_decoder")
    named: dict[int, AddedToken] = {}
    where = str(folder / "tokenizer_config.json")
    for index, item in (cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}).items():
        entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        content = entry.get("content")
        if not index.isdigit() or not isinstance(content, str):
            raise CheckpointError(where, f"added_tokens_decoder has the entry {index!r:.60}, not an id with content")
        flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
        named[int(index)] = AddedToken(content, normalized=bool(entry.get("normalized", False)), **flags)
    old = folder / "added_tokens.json"
    if not named and old.exists():
        where = str(old)
        for content, index in read_json_object(old).items():
            if type(index) is not int:
                raise CheckpointError(where, f"{content!r:.60} has the id {index!r:.60}, which is no integer")
            named[index] = AddedToken(content, special=False, normalized=False)
    special: set[int] = set()
    for index, token in sorted(named.items()):
        if token.special:
            special.add(index)
            tokenizer.add_special_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        else:
            tokenizer.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                where,
                f"gives {token.content!r:.60} the id {index}, but the next free one is "
                f"{tokenizer.token_to_id(token.content)}",
            )
    return special

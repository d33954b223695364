"""The tokenizer of a model and the few facts around it, from a model folder or from a GGUF file.

A folder has ``tokenizer.json``, or one of the files that came before it: Mistral's ``tekken.json``, sentencepiece's or
tiktoken's ``tokenizer.model`` (``unconverted.py``). Nothing is downloaded, no code from the folder is run: one that
comes as code is rebuilt by the engine, where the user allows it, and read here as files. Knows neither requests nor
templates' rules (``octavo/frontend``). Next: ``gguf_tokenizer.py``, ``chat_templates.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from octavo.checkpoint.chat_templates import DEFAULT_TEMPLATE, folder_templates, gguf_templates, mistral_template
from octavo.checkpoint.code import TOKENIZER, read_tokenizer_code
from octavo.checkpoint.files import MAX_TOKENIZER_BYTES, read_json_object, read_text
from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.gguf_parts import one_each
from octavo.checkpoint.gguf_tokenizer import build_gguf_tokenizer
from octavo.checkpoint.unconverted import find_unconverted, is_unconverted, read_unconverted
from octavo.errors import CheckpointError

__all__ = ["DEFAULT_TEMPLATE", "TokenizerData", "frame_text", "load_tokenizer_data", "set_template"]


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """A ready tokenizer. ``encode(text, add_special_tokens=True)`` adds what the model expects around plain text."""

    tokenizer: Tokenizer
    """Without truncation and padding."""
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    """Whether ``add_special_tokens=True`` puts ``bos_token`` in front."""
    add_eos_token: bool = False
    special_token_ids: frozenset[int] = frozenset()
    """What ``skip_special_tokens`` leaves out of decoded text."""
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])
    """Jinja sources by name; the usual one is called ``default``. Untrusted: render in a sandbox only."""


def load_tokenizer_data(path: str | os.PathLike[str]) -> TokenizerData:
    """Load the tokenizer of a model.

    Args:
        path: A folder, a ``.gguf`` file, one of the tokenizer files named above, or a folder whose only tokenizer is
            one GGUF file.

    Raises:
        CheckpointError: The tokenizer is absent, damaged or of a kind that cannot be read.
    """
    where = Path(path)
    if where.is_dir():
        if (where / "tokenizer.json").exists():
            return _from_folder(where)
        own = find_unconverted(where)
        if own is not None:
            return _from_unconverted(own)
        files = one_each(where.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(str(where), _no_tokenizer(where))
        where = files[0]
    if where.name == "tokenizer.json":
        return _from_folder(where.parent)
    if is_unconverted(where):
        return _from_unconverted(where)
    return _from_gguf(where)


def _no_tokenizer(folder: Path) -> str:
    code = read_tokenizer_code(folder)
    if code is not None:
        return (
            f"has no tokenizer that can be read: it comes as Python code ({code.classes[TOKENIZER]}, by auto_map), "
            "which could do anything on this machine and runs only with --trust-remote-code: read it first, or name "
            "another folder that has the tokenizer as tokenizer.json with --tokenizer"
        )
    for name in ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).exists():
            return (
                f"has {name} but no tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    return "has no tokenizer.json"


# --- Hugging Face folder ---


def _from_folder(folder: Path) -> TokenizerData:
    file = folder / "tokenizer.json"
    text = read_text(file, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as exc:  # tokenizers raises bare Exception for every fault of the file
        raise CheckpointError(str(file), f"is not a tokenizer that can be read: {exc}") from exc
    # Both are leftovers of training scripts; a server must never cut or pad a prompt unasked.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    config, token = _folder_words(folder, tokenizer)
    config_file = folder / "tokenizer_config.json"
    bos, bos_id = token("bos_token")
    eos, eos_id = token("eos_token")
    unk, unk_id = token("unk_token")
    pad, pad_id = token("pad_token")
    add_bos = _flag(config, "add_bos_token", str(config_file))
    add_eos = _flag(config, "add_eos_token", str(config_file))
    has_bos, has_eos = _adds(tokenizer, bos_id, eos_id)
    want_bos = has_bos if add_bos is None else add_bos and bos_id is not None
    want_eos = has_eos if add_eos is None else add_eos and eos_id is not None
    if (want_bos, want_eos) != (has_bos, has_eos):
        set_template(tokenizer, (bos, bos_id) if want_bos else None, (eos, eos_id) if want_eos else None)
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    special.update(i for i in (bos_id, eos_id, unk_id, pad_id) if i is not None)
    return TokenizerData(
        tokenizer=tokenizer,
        bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad,
        bos_token_id=bos_id, eos_token_id=eos_id, unk_token_id=unk_id, pad_token_id=pad_id,
        add_bos_token=want_bos, add_eos_token=want_eos,
        special_token_ids=frozenset(special),
        chat_templates=folder_templates(folder, config),
    )  # fmt: skip


def _folder_words(
    folder: Path, tokenizer: Tokenizer
) -> tuple[dict[str, Any], Callable[[str], tuple[str | None, int | None]]]:
    """``tokenizer_config.json``, and a function from a role such as ``bos_token`` to its (token, id)."""
    config_file = folder / "tokenizer_config.json"
    config = read_json_object(config_file) if config_file.exists() else {}
    map_file = folder / "special_tokens_map.json"
    tokens_map = read_json_object(map_file) if map_file.exists() else {}

    def token(role: str) -> tuple[str | None, int | None]:
        for source, origin in ((config, config_file), (tokens_map, map_file)):
            content = _token_content(source.get(role), str(origin), role)
            if content is not None:
                return content, tokenizer.token_to_id(content)
        return None, None

    return config, token


def _token_content(value: Any, file: str, role: str) -> str | None:
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("content")
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError(file, f"{role} must be a string or an object with 'content', not {value!r:.100}")


def _flag(config: Mapping[str, Any], name: str, file: str) -> bool | None:
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(file, f"{name} must be true or false, not {value!r:.100}")


def _adds(tokenizer: Tokenizer, bos_id: int | None, eos_id: int | None) -> tuple[bool, bool]:
    """Whether the post-processor puts bos in front and eos behind, found out by asking it."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    extra = len(ids) > len(plain)
    return extra and ids[0] == bos_id, extra and ids[-1] == eos_id


def set_template(
    tokenizer: Tokenizer,
    bos: tuple[str | None, int | None] | None,
    eos: tuple[str | None, int | None] | None,
    *,
    pair_bos: bool = True,
) -> None:
    """Make ``encode(..., add_special_tokens=True)`` add exactly these (token, id) before and after the text.

    ``pair_bos``: the second of two texts has the first token in front too.
    """
    before, after = ([(str(each[0]), each[1])] if each and each[1] is not None else [] for each in (bos, eos))
    frame_text(tokenizer, before, after, pair_before=pair_bos)


def frame_text(
    tokenizer: Tokenizer,
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
    *,
    pair_before: bool = True,
) -> None:
    """As ``set_template``, with any number of (token, id) on both sides."""
    special: list[Any] = []
    sides: list[list[str]] = []
    for side in (before, after):
        sides.append([f"T{len(special) + index}" for index, _ in enumerate(side)])
        # Names of our own in the template: a token may hold a colon or a space, which mean something there.
        special += [
            {"id": name, "ids": [token_id], "tokens": [token]}
            for name, (token, token_id) in zip(sides[-1], side, strict=True)
        ]
    first, last = ([[f"{name}:{text}" for name in side] for text in (0, 1)] for side in sides)
    single = [*first[0], "$A:0", *last[0]]
    pair = [*single, *(first[1] if pair_before else ()), "$B:1", *last[1]]
    template = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])  # type: ignore[assignment]


# --- folder with another tokenizer file ---


def _from_unconverted(file: Path) -> TokenizerData:
    config_file = file.parent / "tokenizer_config.json"
    own = read_unconverted(file, read_json_object(config_file) if config_file.exists() else {})
    tokenizer = own.tokenizer
    config, named = _folder_words(file.parent, tokenizer)

    def token(role: str) -> tuple[str | None, int | None]:
        content, index = named(role)
        if content is None or index is None:
            content = own.roles.get(role)
            index = None if content is None else tokenizer.token_to_id(content)
        return content, index

    bos, bos_id = token("bos_token")
    eos, eos_id = token("eos_token")
    unk, unk_id = token("unk_token")
    pad, pad_id = token("pad_token")
    stated = _flag(config, "add_bos_token", str(config_file))
    add_bos = (own.add_bos if stated is None else stated) and bos_id is not None
    add_eos = bool(_flag(config, "add_eos_token", str(config_file))) and eos_id is not None
    if add_bos or add_eos:
        set_template(tokenizer, (bos, bos_id) if add_bos else None, (eos, eos_id) if add_eos else None)
    templates = folder_templates(file.parent, config)
    template = None if templates else mistral_template(file)
    return TokenizerData(
        tokenizer=tokenizer,
        bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad,
        bos_token_id=bos_id, eos_token_id=eos_id, unk_token_id=unk_id, pad_token_id=pad_id,
        add_bos_token=add_bos, add_eos_token=add_eos,
        special_token_ids=own.special_ids | {i for i in (bos_id, eos_id, unk_id, pad_id) if i is not None},
        chat_templates=templates if template is None else {DEFAULT_TEMPLATE: template},
    )  # fmt: skip


# --- GGUF ---


def _from_gguf(path: Path) -> TokenizerData:
    with GGUFFile(path) as gguf:
        metadata = gguf.metadata
    file = str(path)
    built = build_gguf_tokenizer(metadata, file)
    tokens = built.tokens

    def named(role: str) -> tuple[str | None, int | None]:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None, None
        # Some converters write 2^32 - 1 for "none".
        if index == 0xFFFFFFFF:
            return None, None
        if type(index) is not int or not 0 <= index < len(tokens):
            raise CheckpointError(
                file, f"tokenizer.ggml.{role}_token_id is {index!r}, but the vocabulary has {len(tokens)} tokens"
            )
        return tokens[index], index

    # A WordPiece text stands between CLS and SEP; the format misspells the key of the second.
    bos, bos_id = named("cls" if built.is_wordpiece and "tokenizer.ggml.cls_token_id" in metadata else "bos")
    eos, eos_id = named("seperator" if built.is_wordpiece else "eos")
    unk, unk_id = named("unknown")
    pad, pad_id = named("padding")
    end_flag = "add_sep_token" if built.is_wordpiece else "add_eos_token"
    add_bos = _gguf_flag(metadata, "add_bos_token", file, built.add_bos_by_default) and bos_id is not None
    add_eos = _gguf_flag(metadata, end_flag, file, built.is_wordpiece) and eos_id is not None
    if add_bos or add_eos:
        set_template(
            built.tokenizer,
            (bos, bos_id) if add_bos else None,
            (eos, eos_id) if add_eos else None,
            pair_bos=not built.is_wordpiece,
        )
    return TokenizerData(
        tokenizer=built.tokenizer,
        bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad,
        bos_token_id=bos_id, eos_token_id=eos_id, unk_token_id=unk_id, pad_token_id=pad_id,
        add_bos_token=add_bos, add_eos_token=add_eos,
        special_token_ids=built.special_token_ids | {i for i in (bos_id, eos_id) if i is not None},
        chat_templates=gguf_templates(metadata, file),
    )  # fmt: skip


def _gguf_flag(metadata: Mapping[str, Any], name: str, file: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(file, f"tokenizer.ggml.{name} must be a boolean, not {value!r:.100}")
    return value

"""The tokenizer of a model and the few facts around it, from a Hugging Face folder or from a GGUF file.

Knows neither requests nor templates' rules (``octavo/frontend``). A folder needs a ``tokenizer.json``; nothing is
downloaded, no code from the folder is run, and ``auto_map`` is not looked at. Next: ``gguf_tokenizer.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from octavo.checkpoint.files import MAX_TOKENIZER_BYTES, read_json_object, read_text
from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.gguf_tokenizer import build_gguf_tokenizer
from octavo.errors import CheckpointError

MAX_TEMPLATE_BYTES = 4 << 20
DEFAULT_TEMPLATE = "default"


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
        path: A folder with ``tokenizer.json``, a ``.gguf`` file, or a folder whose only tokenizer is one GGUF file.

    Raises:
        CheckpointError: The tokenizer is absent, damaged or of a kind that cannot be read.
    """
    where = Path(path)
    if where.is_dir():
        if (where / "tokenizer.json").exists():
            return _from_folder(where)
        files = sorted(where.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(str(where), _no_tokenizer(where))
        where = files[0]
    if where.suffix == ".json":
        return _from_folder(where.parent)
    return _from_gguf(where)


def _no_tokenizer(folder: Path) -> str:
    for name in ("tokenizer.model", "vocab.json", "spiece.model"):
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
        chat_templates=_folder_templates(folder, config),
    )  # fmt: skip


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
    tokenizer: Tokenizer, bos: tuple[str | None, int | None] | None, eos: tuple[str | None, int | None] | None
) -> None:
    """Make ``encode(..., add_special_tokens=True)`` add exactly these (token, id) before and after the text."""
    around = [pair for pair in (bos, eos) if pair is not None]
    special_tokens = [(str(name), int(index)) for name, index in around if index is not None]
    before = f"{bos[0]}:0 " if bos else ""
    after = f" {eos[0]}:0" if eos else ""
    before_b = f" {bos[0]}:1" if bos else ""
    after_b = f" {eos[0]}:1" if eos else ""
    template = TemplateProcessing(
        single=f"{before}$A:0{after}",
        pair=f"{before}$A:0{after}{before_b} $B:1{after_b}",
        special_tokens=special_tokens,
    )
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])  # type: ignore[assignment]


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All templates of a folder; files win over what tokenizer_config.json says."""
    templates = _config_templates(config.get("chat_template"), str(folder / "tokenizer_config.json"))
    for name in ("additional_chat_templates", "chat_templates"):
        for path in sorted((folder / name).glob("*.jinja")):
            templates[path.stem] = read_text(path, MAX_TEMPLATE_BYTES)
    if (folder / "chat_template.jinja").exists():
        templates[DEFAULT_TEMPLATE] = read_text(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    elif (folder / "chat_template.json").exists():
        text = read_json_object(folder / "chat_template.json").get("chat_template")
        if isinstance(text, str):
            templates[DEFAULT_TEMPLATE] = text
    return templates


def _config_templates(stored: Any, file: str) -> dict[str, str]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT_TEMPLATE: stored}
    if not isinstance(stored, list):
        raise CheckpointError(file, f"chat_template must be a string or a list, not {type(stored).__name__}")
    templates: dict[str, str] = {}
    for item in cast("list[Any]", stored):
        entry: dict[str, Any] = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        name, text = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(file, "chat_template entries must be objects with 'name' and 'template' strings")
        templates[name] = text
    return templates


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

    bos, bos_id = named("bos")
    eos, eos_id = named("eos")
    unk, unk_id = named("unknown")
    pad, pad_id = named("padding")
    add_bos = _gguf_flag(metadata, "add_bos_token", file, built.add_bos_by_default) and bos_id is not None
    add_eos = _gguf_flag(metadata, "add_eos_token", file, False) and eos_id is not None
    if add_bos or add_eos:
        set_template(built.tokenizer, (bos, bos_id) if add_bos else None, (eos, eos_id) if add_eos else None)
    return TokenizerData(
        tokenizer=built.tokenizer,
        bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad,
        bos_token_id=bos_id, eos_token_id=eos_id, unk_token_id=unk_id, pad_token_id=pad_id,
        add_bos_token=add_bos, add_eos_token=add_eos,
        special_token_ids=built.special_token_ids | {i for i in (bos_id, eos_id) if i is not None},
        chat_templates=_gguf_templates(metadata, file),
    )  # fmt: skip


def _gguf_flag(metadata: Mapping[str, Any], name: str, file: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(file, f"tokenizer.ggml.{name} must be a boolean, not {value!r:.100}")
    return value


def _gguf_templates(metadata: Mapping[str, Any], file: str) -> dict[str, str]:
    key = "tokenizer.chat_template"
    templates: dict[str, str] = {}
    for name, text in metadata.items():
        if name != key and not name.startswith(f"{key}."):
            continue
        if not isinstance(text, str):
            raise CheckpointError(file, f"{name} must be a string, not {type(text).__name__}")
        templates[name[len(key) + 1 :] or DEFAULT_TEMPLATE] = text
    return templates

"""Where the chat templates of a model folder are kept, and in which order one place wins over another.

From the strongest: ``chat_template.jinja``; ``chat_template.json`` and ``processor_config.json`` (what processors of
multi-modal models save); ``additional_chat_templates/`` and ``chat_templates/`` (named ones); ``chat_template`` in
``tokenizer_config.json``, a string or a list of named ones. Of a folder that has only Mistral's own tokenizer file
(tekken, or a versioned sentencepiece model), the package ``mistral-common`` writes the template, if it is installed.

Templates are text here: ``octavo/frontend/chat_template.py`` runs them, in a sandbox. GGUF files keep theirs in their
metadata, see ``tokenizer_data.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from octavo.checkpoint.files import read_json_object, read_text
from octavo.errors import CheckpointError

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 4 << 20
DEFAULT_TEMPLATE = "default"
_MISTRAL_MODEL = re.compile(r"\.model\.v\d+\w*\Z|tekken\.json\Z|tekken_\w+\.json\Z|tokenizer\.model\.v1\Z")
_MISTRAL_MODULE = "mistral_common.integrations.chat_templates.chat_templates"


def folder_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """All templates of a folder by name; the usual one is called ``default``.

    Raises:
        CheckpointError: A place holds something that is no template.
    """
    templates = _named(tokenizer_config.get("chat_template"), str(folder / "tokenizer_config.json"))
    for name in ("chat_templates", "additional_chat_templates"):
        for path in sorted((folder / name).glob("*.jinja")):
            templates[path.stem] = read_text(path, MAX_TEMPLATE_BYTES)
    for name in ("processor_config.json", "chat_template.json"):
        if (folder / name).exists():
            templates |= _named(read_json_object(folder / name).get("chat_template"), str(folder / name))
    if (folder / "chat_template.jinja").exists():
        templates[DEFAULT_TEMPLATE] = read_text(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    return templates


def _named(stored: Any, file: str) -> dict[str, str]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT_TEMPLATE: stored}
    if isinstance(stored, dict):
        stored = [{"name": name, "template": text} for name, text in cast("dict[str, Any]", stored).items()]
    if not isinstance(stored, list):
        raise CheckpointError(file, f"chat_template must be a string or a list, not {type(stored).__name__}")
    templates: dict[str, str] = {}
    for item in cast("list[Any]", stored):
        entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        name, text = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(file, "chat_template entries must be objects with 'name' and 'template' strings")
        templates[name] = text
    return templates


def gguf_templates(metadata: Mapping[str, Any], file: str) -> dict[str, str]:
    """The templates in a GGUF header: ``tokenizer.chat_template`` and ``tokenizer.chat_template.NAME``.

    Raises:
        CheckpointError: One of them is not text.
    """
    key = "tokenizer.chat_template"
    templates: dict[str, str] = {}
    for name, text in metadata.items():
        # A list of the names that follow; the names are in the keys too.
        if name != key and not name.startswith(f"{key}."):
            continue
        if not isinstance(text, str):
            raise CheckpointError(file, f"{name} must be a string, not {type(text).__name__}")
        templates[name[len(key) + 1 :] or DEFAULT_TEMPLATE] = text
    return templates


def is_mistral_file(path: Path) -> bool:
    """Whether a tokenizer file is named as Mistral names its own: ``tekken.json``, ``tokenizer.model.v3``."""
    return _MISTRAL_MODEL.search(path.name) is not None


def mistral_template(path: Path) -> str | None:
    """The template for Mistral's own tokenizer file, from ``mistral-common``; None without the package or for others.

    The package tells the versions of the format apart by the file's name and content.
    """
    if not is_mistral_file(path):
        return None
    if importlib.util.find_spec("mistral_common") is None:
        logger.warning(
            "%s comes without a chat template: install mistral-common (pip install octavo[mistral]) to have it, or "
            "give one with --chat-template",
            path,
        )
        return None
    convert = importlib.import_module(_MISTRAL_MODULE).convert_tokenizer_to_chat_template
    refused: type[Exception] = importlib.import_module("mistral_common.exceptions").MistralCommonException
    # Whether the tokens speak of thinking is not in the file; the guess is wrong for models that do not think.
    try:
        return str(convert(path, plain_thinking_support=False))
    except (refused, ValueError, AssertionError, KeyError, TypeError) as exc:
        logger.warning("%s has no chat template that mistral-common knows: %s", path, exc)
        return None

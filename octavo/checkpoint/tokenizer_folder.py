"""A tokenizer as the files that transformers reads too: the way back of ``load_tokenizer_data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.checkpoint.chat_templates import DEFAULT_TEMPLATE
from octavo.checkpoint.tokenizer_data import TokenizerData


def write_tokenizer(folder: Path, data: TokenizerData) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into an existing folder."""
    data.tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": data.add_bos_token,
        "add_eos_token": data.add_eos_token,
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unk", "pad"):
        token: str | None = getattr(data, f"{role}_token")
        if token is not None:
            config[f"{role}_token"] = token
    if set(data.chat_templates) == {DEFAULT_TEMPLATE}:
        config["chat_template"] = data.chat_templates[DEFAULT_TEMPLATE]
    elif data.chat_templates:
        config["chat_template"] = [{"name": k, "template": v} for k, v in data.chat_templates.items()]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

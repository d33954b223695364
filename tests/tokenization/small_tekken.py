"""A tekken file with the first tokens of a real one, for tests that would take long with all of them."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common

NUM_TOKENS = 30_000


def small_tekken(folder: Path) -> Path:
    """Write ``tekken.json`` into ``folder``, special tokens as in the original."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    content = json.loads(source.read_text(encoding="utf-8"))
    content["vocab"] = content["vocab"][:NUM_TOKENS]
    config = content["config"]
    config["num_vocab_tokens"] = NUM_TOKENS
    config["default_vocab_size"] = NUM_TOKENS + config["default_num_special_tokens"]
    path = folder / "tekken.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path

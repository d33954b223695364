"""A ``tokenizer.json`` in the words of GGUF metadata, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6


def added_types(tree: dict[str, Any]) -> dict[int, int]:
    return {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in tree["added_tokens"]}


def byte_level_metadata(raw: Tokenizer, pre: str) -> dict[str, Any]:
    """Of a byte-level BPE tokenizer."""
    tree = json.loads(raw.to_str())
    types = added_types(tree)
    ids = {index: token for token, index in raw.get_vocab(with_added_tokens=True).items()}
    size = max(ids) + 1
    merges = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": [types.get(i, NORMAL if i in ids else UNUSED) for i in range(size)],
        "tokenizer.ggml.merges": merges,
    }


def sentencepiece_metadata(raw: Tokenizer, prefix_space: bool) -> dict[str, Any]:
    """Of a BPE tokenizer that was made from sentencepiece pieces: scores are given back by the order of its merges."""
    tree = json.loads(raw.to_str())
    types = added_types(tree)
    ids = {index: token for token, index in raw.get_vocab(with_added_tokens=True).items()}
    scores = dict.fromkeys(range(len(ids)), 0.0)
    vocab = tree["model"]["vocab"]
    for rank, merge in enumerate(tree["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        index = vocab[left + right]
        if not scores[index]:
            scores[index] = -float(rank + 1)
    for index, token in ids.items():
        if len(token) == 6 and token.startswith("<0x"):
            types[index] = BYTE
    tokens = [ids[i].replace("\u2581", " ") if types.get(i) == USER_DEFINED else ids[i] for i in range(len(ids))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(i, NORMAL) for i in range(len(ids))],
        "tokenizer.ggml.scores": [scores[i] for i in range(len(ids))],
        "tokenizer.ggml.add_space_prefix": prefix_space,
    }


def word_piece_metadata(raw: Tokenizer) -> dict[str, Any]:
    """Of BERT's tokenizer: pieces that begin a word are marked instead of those that do not."""
    tree = json.loads(raw.to_str())
    vocab = sorted(tree["model"]["vocab"].items(), key=lambda item: item[1])

    def marked(token: str) -> str:
        if token.startswith("##"):
            return token[2:]
        return token if token.startswith("[") and token.endswith("]") else f"\u2581{token}"

    roles = {"unknown": "[UNK]", "cls": "[CLS]", "seperator": "[SEP]", "mask": "[MASK]", "padding": "[PAD]"}
    ids = dict(vocab)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [marked(token) for token, _ in vocab],
        "tokenizer.ggml.token_type": [added_types(tree).get(index, NORMAL) for _, index in vocab],
        **{f"tokenizer.ggml.{role}_token_id": ids[token] for role, token in roles.items() if token in ids},
    }

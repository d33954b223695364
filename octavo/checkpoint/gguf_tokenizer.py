"""A ``tokenizers.Tokenizer`` out of the vocabulary that a GGUF file carries.

Two kinds are read: byte-level BPE (``gpt2``) with the pre-tokenisers named below, and sentencepiece BPE with byte
fallback (``llama``). The name of the pre-tokeniser decides where text is cut before merging, so an unknown name is
refused: guessing would give other token ids than the model was trained on, and nothing would say so.

Knows only metadata words (``tokenizer.ggml.*``) and not how they are read from the file (``gguf_file.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.errors import CheckpointError

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_MAX_MERGE_PIECE = 512

_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _Split:
    """How a named pre-tokeniser cuts text."""

    regex: str | None = None
    """None: the GPT-2 expression built into ByteLevel."""
    single_digits: bool = False
    """Every digit is a piece of its own, cut before the expression is applied."""
    nfc: bool = False
    ignore_merges: bool = False
    """A piece that is a token as a whole is not merged step by step."""
    add_bos: bool = False
    """Where the file does not say."""


_LLAMA3 = _Split(regex=_LLAMA3_REGEX, ignore_merges=True, add_bos=True)
_SPLITS: Mapping[str, _Split] = {
    "gpt-2": _Split(),
    "gpt2": _Split(),
    "smollm": _Split(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Split(regex=_QWEN2_REGEX, nfc=True),
}


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """What ``build_gguf_tokenizer`` returns."""

    tokenizer: Tokenizer
    tokens: list[str]
    special_token_ids: frozenset[int]
    add_bos_by_default: bool


def build_gguf_tokenizer(metadata: Mapping[str, Any], file: str) -> GGUFTokenizer:
    """Build the tokenizer that ``metadata`` describes; ``file`` is named in errors.

    Raises:
        CheckpointError: A list is missing, of the wrong kind or length, or the kind of tokenizer is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _list(metadata, "tokens", str, file)
    if kind is None or tokens is None:
        raise CheckpointError(
            file, "carries no tokenizer (tokenizer.ggml.model and .tokens); give one with --tokenizer"
        )
    types = _list(metadata, "token_type", int, file) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            file, f"tokenizer.ggml.token_type has {len(types)} entries, but tokenizer.ggml.tokens has {len(tokens)}"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(file, f"tokenizer.ggml.tokens holds {twice!r:.100} twice")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(metadata, vocab, file)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(metadata, tokens, types, vocab, file), True
    else:
        raise CheckpointError(file, f"tokenizer.ggml.model is {kind!r:.100}, but only 'gpt2' and 'llama' can be read")

    special = [index for index, t in enumerate(types) if t == _CONTROL]
    plain = [index for index, t in enumerate(types) if t == _USER_DEFINED]
    added = [AddedToken(tokens[i], special=True, normalized=False) for i in special if tokens[i]]
    tokenizer.add_special_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    added = [AddedToken(tokens[i], special=False, normalized=False) for i in plain if tokens[i]]
    tokenizer.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    return GGUFTokenizer(tokenizer, tokens, frozenset(special), add_bos)


def _list(metadata: Mapping[str, Any], name: str, kind: type, file: str) -> list[Any] | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    items = cast("list[Any]", value) if isinstance(value, list) else None
    # One look at the first element is enough: a GGUF array has one type for all.
    if items is None or not items or type(items[0]) is not kind:
        raise CheckpointError(file, f"tokenizer.ggml.{name} must be a list of {kind.__name__}, not {value!r:.60}")
    return items


def _byte_level_bpe(metadata: Mapping[str, Any], vocab: dict[str, int], file: str) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        logger.warning("%s does not name its pre-tokeniser; cutting text as GPT-2 does, token ids may be wrong", file)
        name = "gpt-2"
    split = _SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise CheckpointError(
            file,
            f"tokenizer.ggml.pre is {name!r:.100}, but only {', '.join(sorted(_SPLITS))} are known; "
            "give the model's Hugging Face tokenizer with --tokenizer",
        )
    merges = _merges(_list(metadata, "merges", str, file), file)
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges)
    except Exception as exc:  # tokenizers raises bare Exception for a merge outside the vocabulary
        raise CheckpointError(file, f"tokenizer.ggml.merges do not fit the tokens: {exc}") from exc
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    steps: list[Any] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer, split.add_bos


def _merges(lines: list[Any] | None, file: str) -> list[tuple[str, str]]:
    if lines is None:
        raise CheckpointError(file, "has a gpt2 tokenizer without tokenizer.ggml.merges")
    merges: list[tuple[str, str]] = []
    for index, line in enumerate(lines):
        left, space, right = line.partition(" ")
        if not left or not space or not right:
            raise CheckpointError(file, f"tokenizer.ggml.merges: entry {index} is {line!r:.60}, not two pieces")
        merges.append((left, right))
    return merges


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int], file: str
) -> Tokenizer:
    """Sentencepiece merges the adjacent pair whose union scores highest. As ranked merges: every way to cut a piece
    into two known pieces, ordered by the score of the whole."""
    scores = _list(metadata, "scores", float, file)
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(file, f"tokenizer.ggml.scores must have {len(tokens)} entries, one for each token")
    if any(score != score for score in scores):
        raise CheckpointError(file, "tokenizer.ggml.scores holds NaN")
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(tokens):
        if types[index] in (_CONTROL, _BYTE) or not 1 < len(piece) <= _MAX_MERGE_PIECE:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unk = tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None
    model = models.BPE(
        vocab=vocab, merges=[(e[3], e[4]) for e in ranked], unk_token=unk, fuse_unk=True,
        byte_fallback=any(t == _BYTE for t in types),
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    ending: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return tokenizer

"""Tokenizers of the SentencePiece kind out of pieces with scores: BPE and unigram, with byte fallback.

Sentencepiece's own ``.model`` files (``sentencepiece_file.py``) and GGUF files (``gguf_tokenizer.py``) hold the same
things in other words; both end here. Paper: Kudo and Richardson, "SentencePiece", EMNLP 2018.

Knows no files. Where it differs from sentencepiece: special tokens spelt out in a text become those tokens, and with
unigram models also the names of byte tokens (``<0x0A>``) do, since ``tokenizers`` looks for them among the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces: the same numbers in sentencepiece's files and in GGUF."""
MAX_MERGE_PIECE = 512
"""Characters of a piece that merging may make: the number of ways to cut one grows with its length."""
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary of pieces and how text becomes what they are looked for in."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unigram: bool
    """Else BPE."""
    unknown_id: int | None
    charsmap: bytes = b""
    """Sentencepiece's compiled normalisation; empty keeps text as it is."""
    prefix_space: bool = True
    """A space is put before a text (and before what follows a special token)."""
    prefix_first_only: bool = False
    """The space is put before a text only where it begins, and not if it begins with one: ``legacy: false``."""
    trim_spaces: bool = False
    """Runs of spaces count as one, and none is kept at either end."""


def build_piece_tokenizer(pieces: Pieces) -> Tokenizer:
    """The tokenizer of ``pieces``, added tokens included.

    Raises:
        ValueError: The pieces are no vocabulary; ``tokenizers``' reason.
    """
    try:
        tokenizer = Tokenizer(_unigram(pieces) if pieces.unigram else _bpe(pieces))
        charsmap: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    except Exception as exc:  # tokenizers raises bare Exception for every fault of a vocabulary
        raise ValueError(str(exc)) from exc
    steps = charsmap
    if pieces.trim_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.prefix_space and pieces.prefix_first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            replacement=SPACE, prepend_scheme="first", split=False
        )
    else:
        steps += [normalizers.Prepend(SPACE)] if pieces.prefix_space else []
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    ending: list[Any] = [decoders.Strip(content=" ", left=1)] if pieces.prefix_space else []
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    add_tokens(tokenizer, pieces.tokens, pieces.types)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control pieces special tokens and user-defined ones added tokens, found before anything else."""
    control = [AddedToken(token, special=True, normalized=False) for token in _of_type(tokens, types, CONTROL)]
    tokenizer.add_special_tokens(control)  # pyright: ignore[reportUnknownMemberType]
    plain = [AddedToken(token, special=False, normalized=False) for token in _of_type(tokens, types, USER_DEFINED)]
    tokenizer.add_tokens(plain)  # pyright: ignore[reportUnknownMemberType]


def _of_type(tokens: Sequence[str], types: Sequence[int], kind: int) -> list[str]:
    return [token for token, its in zip(tokens, types, strict=True) if its == kind and token]


def _unigram(pieces: Pieces) -> models.Unigram:
    return models.Unigram(
        vocab=list(zip(pieces.tokens, pieces.scores, strict=True)),
        unk_id=pieces.unknown_id,
        byte_fallback=BYTE in pieces.types,
    )


def _bpe(pieces: Pieces) -> models.BPE:
    """Sentencepiece merges the adjacent pair whose union scores highest. As ranked merges: every way to cut a piece
    into two known pieces, ordered by the score of the whole."""
    tokens, scores = pieces.tokens, pieces.scores
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(tokens):
        if pieces.types[index] in (CONTROL, BYTE) or not 1 < len(piece) <= MAX_MERGE_PIECE:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return models.BPE(
        vocab=vocab,
        merges=[(entry[3], entry[4]) for entry in ranked],
        unk_token=None if pieces.unknown_id is None else tokens[pieces.unknown_id],
        fuse_unk=True,
        byte_fallback=BYTE in pieces.types,
    )

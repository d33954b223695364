"""A ``tokenizers.Tokenizer`` out of the vocabulary that a GGUF file carries.

Four kinds are read: byte-level BPE (``gpt2``), sentencepiece's BPE (``llama``) and unigram (``t5``), and WordPiece
(``bert``). Of byte-level BPE the name of the pre-tokeniser decides where text is cut before merging, so an unknown name
is refused: guessing would give other token ids than the model was trained on, and nothing would say so.

Knows only metadata words (``tokenizer.ggml.*``) and not how they are read from the file (``gguf_file.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.checkpoint.byte_bpe import CUTS, byte_level
from octavo.checkpoint.pieces import CONTROL, SPACE, Pieces, add_tokens, build_piece_tokenizer
from octavo.errors import CheckpointError

logger = logging.getLogger(__name__)

_OLD_CUT = "gpt-2"
"""What files that name no pre-tokeniser were mostly made for."""
_MAX_WORD_CHARS = 100
"""WordPiece gives up on longer words; BERT's own limit."""


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """What ``build_gguf_tokenizer`` returns."""

    tokenizer: Tokenizer
    tokens: list[str]
    """As the tokenizer spells them, by id."""
    special_token_ids: frozenset[int]
    add_bos_by_default: bool
    is_wordpiece: bool = False
    """Text stands between the tokens that the file calls CLS and SEP."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The checked lists that every kind has."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]
    file: str

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(self.file, reason)

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def scores(self) -> list[float]:
        """One finite number for each token."""
        scores = _list(self.metadata, "scores", float, self.file)
        if scores is None or len(scores) != len(self.tokens):
            raise self.error(f"tokenizer.ggml.scores must have {len(self.tokens)} entries, one for each token")
        if not all(math.isfinite(score) for score in scores):
            raise self.error("tokenizer.ggml.scores holds a value that is not a finite number")
        return scores

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"tokenizer.ggml.{name} must be a boolean, not {value!r:.100}")
        return value

    def token_id(self, name: str, default: int) -> int | None:
        """The id of a token with a role, or None where the vocabulary has none."""
        value = self.get(f"{name}_token_id", default)
        return value if type(value) is int and 0 <= value < len(self.tokens) else None


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
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise CheckpointError(file, f"tokenizer.ggml.tokens holds {twice!r:.100} twice")
    vocabulary = _Vocabulary(metadata, tokens, types, file)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(vocabulary, ids)
    elif kind == "llama":
        tokenizer, add_bos = _pieces(vocabulary, unigram=False), True
    elif kind == "t5":
        tokenizer, add_bos = _pieces(vocabulary, unigram=True), False
    elif kind == "bert":
        return _word_piece(vocabulary)
    else:
        raise CheckpointError(
            file, f"tokenizer.ggml.model is {kind!r:.100}, but only 'gpt2', 'llama', 't5' and 'bert' can be read"
        )
    special = frozenset(index for index, its in enumerate(types) if its == CONTROL)
    return GGUFTokenizer(tokenizer, tokens, special, add_bos)


def _list(metadata: Mapping[str, Any], name: str, kind: type, file: str) -> list[Any] | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    items = cast("list[Any]", value) if isinstance(value, list) else None
    # One look at the first element is enough: a GGUF array has one type for all.
    if items is None or not items or type(items[0]) is not kind:
        raise CheckpointError(file, f"tokenizer.ggml.{name} must be a list of {kind.__name__}, not {value!r:.60}")
    return items


def _byte_level_bpe(vocabulary: _Vocabulary, ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    name = vocabulary.get("pre")
    if name in (None, "default"):
        logger.warning(
            "%s does not name its pre-tokeniser; cutting text as GPT-2 does, token ids may be wrong", vocabulary.file
        )
        name = _OLD_CUT
    cut = CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise vocabulary.error(
            f"tokenizer.ggml.pre is {name!r:.100}, but only {', '.join(sorted(CUTS))} are known; "
            "give the model's Hugging Face tokenizer with --tokenizer"
        )
    merges = _merges(_list(vocabulary.metadata, "merges", str, vocabulary.file), vocabulary)
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=cut.ignore_merges)
    except Exception as exc:  # tokenizers raises bare Exception for a merge outside the vocabulary
        raise vocabulary.error(f"tokenizer.ggml.merges do not fit the tokens: {exc}") from exc
    tokenizer = byte_level(model, cut)
    add_tokens(tokenizer, vocabulary.tokens, vocabulary.types)
    return tokenizer, cut.add_bos


def _merges(lines: list[Any] | None, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    if lines is None:
        raise vocabulary.error("has a gpt2 tokenizer without tokenizer.ggml.merges")
    merges: list[tuple[str, str]] = []
    for index, line in enumerate(lines):
        left, space, right = line.partition(" ")
        if not left or not space or not right:
            raise vocabulary.error(f"tokenizer.ggml.merges: entry {index} is {line!r:.60}, not two pieces")
        merges.append((left, right))
    return merges


def _pieces(vocabulary: _Vocabulary, *, unigram: bool) -> Tokenizer:
    charsmap = vocabulary.get("precompiled_charsmap") if unigram else None
    if charsmap is not None and not isinstance(charsmap, list):
        raise vocabulary.error("tokenizer.ggml.precompiled_charsmap must be a list of bytes")
    pieces = Pieces(
        tokens=vocabulary.tokens,
        scores=vocabulary.scores(),
        types=vocabulary.types,
        unigram=unigram,
        unknown_id=vocabulary.token_id("unknown", 2 if unigram else 0),
        # Arrays of int8 come as negative numbers too.
        charsmap=bytes(byte & 0xFF for byte in cast("list[int]", charsmap or [])),
        prefix_space=vocabulary.flag("add_space_prefix", not unigram),
        trim_spaces=vocabulary.flag("remove_extra_whitespaces", False) if unigram else False,
    )
    try:
        return build_piece_tokenizer(pieces)
    except ValueError as exc:
        raise vocabulary.error(f"holds no vocabulary that can be rebuilt: {exc}") from exc


def _word_piece(vocabulary: _Vocabulary) -> GGUFTokenizer:
    """llama.cpp marks pieces that begin a word; BERT's files mark those that do not, and so does the result."""
    tokens = vocabulary.tokens

    def spelling(token: str) -> str:
        if token.startswith(SPACE):
            return token[len(SPACE) :]
        return token if token.startswith("[") and token.endswith("]") and len(token) > 1 else f"##{token}"

    spelt = [spelling(t) for t in tokens] if any(t.startswith(SPACE) for t in tokens) else tokens
    ids = {token: index for index, token in enumerate(spelt)}
    unknown = vocabulary.token_id("unknown", 100)
    if len(ids) != len(spelt) or unknown is None:
        raise vocabulary.error("holds no WordPiece vocabulary: a piece occurs twice, or there is no unknown token")
    tokenizer = Tokenizer(
        models.WordPiece(vocab=ids, unk_token=spelt[unknown], max_input_chars_per_word=_MAX_WORD_CHARS)
    )
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(  # type: ignore[assignment]
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase),
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # type: ignore[assignment]
    roles = {"unknown": 100, "cls": 101, "seperator": 102, "mask": 103, "padding": 0}
    special = {index for index, its in enumerate(vocabulary.types) if its == CONTROL}
    special |= {index for role, default in roles.items() if (index := vocabulary.token_id(role, default)) is not None}
    types = [CONTROL if index in special else 1 for index in range(len(spelt))]
    add_tokens(tokenizer, spelt, types)
    return GGUFTokenizer(tokenizer, spelt, frozenset(special), add_bos_by_default=True, is_wordpiece=True)

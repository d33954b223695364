"""Token ids to text as they come, never half a character.

A ``TextDecoder`` belongs to a tokenizer and is shared; a ``TextStream`` belongs to one answer and has its state. Three
kinds of decoder:

- ``ByteLevelDecoder``: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2). Each token is a fixed string of bytes, so the
  stream is a table and a UTF-8 decoder.
- ``ByteFallbackDecoder``: sentencepiece-like (Llama 2, Mistral, Gemma): U+2581 is a space and ``<0xNN>`` a byte.
- ``WindowDecoder``: everything else, by decoding a short window of ids twice and taking the difference.

Concatenated, a stream equals the whole decode. One exception: where byte tokens do not form UTF-8, a
``ByteFallbackDecoder`` writes one U+FFFD for each malformed sequence (as Unicode recommends) where ``tokenizers``
throws away the whole run of bytes, the good characters before the bad one included; a stream has shown those by then.

Knows no stop strings: see ``detokenizer.py``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

from tokenizers import Tokenizer as RawTokenizer

from octavo.checkpoint.byte_bpe import byte_alphabet

REPLACEMENT = "\ufffd"
MAX_PENDING_TOKENS = 8
"""A character has at most four bytes, so at most four tokens: a longer wait is for something that is not text."""
PROMPT_TAIL = 8
"""Tokens of the prompt that a stream looks at: enough for a character cut in two and for a space to attach to."""


class TextStream(Protocol):
    """Text of one answer as it grows."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that ``token_ids`` complete; empty while a character is not whole."""
        ...

    def flush(self) -> str:
        """What is left at the true end: U+FFFD for bytes that never became a character."""
        ...


class TextDecoder(Protocol):
    """What the decoder of one tokenizer can do. Thread-safe."""

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, its leading space kept; U+FFFD for parts of characters."""
        ...

    def stream(self, prompt_tail: Sequence[int], skip: frozenset[int]) -> TextStream:
        """Start an answer.

        Args:
            prompt_tail: Last ids of what stands before, so that spaces and cut characters join; may be empty.
            skip: Ids that give no text.
        """
        ...


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


class _PieceStream:
    """A stream over a table of pieces: ``str`` for whole text, ``bytes`` for what may be a part of a character."""

    __slots__ = ("_piece", "_strip", "_utf8", "_pending", "_carried")

    def __init__(self, pieces: _Pieces, prompt_tail: Sequence[int], *, strip: bool) -> None:
        self._piece = pieces.__getitem__
        self._strip = False
        self._utf8 = _utf8_decoder()
        self._pending = False
        self._carried = False
        # A prompt that ends within a character leaves its first bytes in the decoder; its text is not ours to give.
        self.push(prompt_tail)
        self._carried = self._pending
        self._strip = strip and all(token_id in pieces.skip for token_id in prompt_tail)

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._piece(token_id)
            if self._pending or self._strip or not isinstance(piece, str):
                piece = self._add(piece)
            text += piece
        return text

    def _add(self, piece: str | bytes) -> str:
        """Text that one piece completes."""
        if not piece:
            return ""
        if self._carried:
            self._carried = False
            if isinstance(piece, str):  # the prompt's character stays cut
                self._close()
        if isinstance(piece, str):
            if not self._pending:
                return self._stripped(piece) if self._strip else piece
            piece = piece.encode()
        text = self._utf8.decode(piece)
        self._pending = bool(self._utf8.getstate()[0])
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        return self._close() if self._pending and not self._carried else ""

    def _close(self) -> str:
        self._pending = False
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        if not text:
            return text
        self._strip = False
        return text[1:] if text[0] == " " else text


class _Pieces(dict[int, "str | bytes"]):
    """Pieces made so far. Filling it lazily saves the third of a second that 150,000 pieces would take at start-up.

    Args:
        raw: Knows the tokens.
        to_piece: Makes a piece of one.
        skip: Ids that have the empty piece.
    """

    def __init__(self, raw: RawTokenizer, to_piece: _ToPiece, skip: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(skip, ""))
        self.skip = skip
        self._raw = raw
        self._to_piece = to_piece

    def __missing__(self, token_id: int) -> str | bytes:
        """Make the piece of an id; an id without a token (vocabularies are padded) has the empty one."""
        token = self._raw.id_to_token(token_id)
        piece = "" if token is None else self._to_piece(token)
        self[token_id] = piece
        return piece


class _ToPiece(Protocol):
    def __call__(self, token: str) -> str | bytes: ...


class _PieceDecoder:
    """A decoder for which the text of a token does not depend on other tokens, but for characters cut in two.

    Args:
        raw: Knows the tokens.
        to_piece: Makes a piece of one.
        strip: The first space of a text is the tokenizer's own and not shown.
    """

    def __init__(self, raw: RawTokenizer, to_piece: _ToPiece, *, strip: bool = False) -> None:
        self._raw = raw
        self._to_piece = to_piece
        self._strip = strip
        self._tables: dict[frozenset[int], _Pieces] = {}
        """By ids without text: there are hardly more than two such sets."""

    def token_text(self, token_id: int) -> str:
        """See ``TextDecoder``."""
        piece = self._table(frozenset())[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def stream(self, prompt_tail: Sequence[int], skip: frozenset[int]) -> TextStream:
        """See ``TextDecoder``."""
        return _PieceStream(self._table(skip), prompt_tail, strip=self._strip)

    def _table(self, skip: frozenset[int]) -> _Pieces:
        found = self._tables.get(skip)
        if found is None:
            found = self._tables[skip] = _Pieces(self._raw, self._to_piece, skip)
        return found


class ByteLevelDecoder(_PieceDecoder):
    """Byte-level BPE: each character of a token is one byte."""

    def __init__(self, raw: RawTokenizer) -> None:
        super().__init__(raw, self._to_piece)
        self._alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}

    def _to_piece(self, token: str) -> str | bytes:
        try:
            piece = bytes([self._alphabet[character] for character in token])
        except KeyError:  # an added token in plain text
            return token
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return piece


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class ByteFallbackDecoder(_PieceDecoder):
    """Sentencepiece's convention."""

    def __init__(self, raw: RawTokenizer, *, strip: bool) -> None:
        super().__init__(raw, self._to_piece, strip=strip)

    @staticmethod
    def _to_piece(token: str) -> str | bytes:
        found = _BYTE_TOKEN.match(token)
        return bytes([int(found[1], 16)]) if found else token.replace("\u2581", " ")


class WindowDecoder:
    """Any decoder, seen from outside."""

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special ones included."""
        return self._raw.decode(token_ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """See ``TextDecoder``."""
        return self.decode([token_id])

    def stream(self, prompt_tail: Sequence[int], skip: frozenset[int]) -> TextStream:
        """See ``TextDecoder``."""
        return _WindowStream(self, prompt_tail, skip)


class _WindowStream:
    """Decode ``ids[start:]`` with and without what is new; the start moves only to where text has been given out.

    A decoder treats the first token of a text in its own way (drops its space); as both texts start at the same
    token, the difference does not show it.
    """

    __slots__ = ("_decoder", "_skip", "_ids", "_given", "_num_given")

    def __init__(self, decoder: WindowDecoder, prompt_tail: Sequence[int], skip: frozenset[int]) -> None:
        self._decoder = decoder
        self._skip = skip
        self._ids = [token_id for token_id in prompt_tail if token_id not in skip]
        self._num_given = len(self._ids)
        self._given = decoder.decode(self._ids)
        while self._num_given and self._given.endswith(REPLACEMENT):  # the prompt ends within a character
            self._num_given -= 1
            self._given = decoder.decode(self._ids[: self._num_given])

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._add, token_ids))

    def _add(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        text = self._decoder.decode(self._ids)
        waiting = len(self._ids) - self._num_given
        if text.endswith(REPLACEMENT) and waiting < MAX_PENDING_TOKENS:
            return ""
        return self._give(text)

    def flush(self) -> str:
        if len(self._ids) == self._num_given:
            return ""
        return self._give(self._decoder.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        # Keep the tokens just given, so that the next text starts after something that shows.
        if new:
            del self._ids[: self._num_given]
            text = self._decoder.decode(self._ids)
        self._given = text
        self._num_given = len(self._ids)
        return new


class UnspacedSpecialStream:
    """Around a stream: no space between two special tokens that follow each other."""

    __slots__ = ("_inner", "_special", "_after_special")

    def __init__(self, inner: TextStream, special: frozenset[int]) -> None:
        self._inner = inner
        self._special = special
        self._after_special = False

    def push(self, token_ids: Sequence[int]) -> str:
        """See ``TextStream``."""
        return "".join(map(self._add, token_ids))

    def flush(self) -> str:
        """See ``TextStream``."""
        return self._inner.flush()

    def _add(self, token_id: int) -> str:
        text = self._inner.push((token_id,))
        is_special = token_id in self._special
        if is_special and self._after_special:
            text = text.removeprefix(" ")
        self._after_special = is_special
        return text


def make_decoder(raw: RawTokenizer) -> TextDecoder:
    """The fastest decoder that gives the same text as the tokenizer's own."""
    steps = list(_decoder_steps(raw))
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelDecoder(raw)
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces:
        rest = steps[3:]
        if not rest:
            return ByteFallbackDecoder(raw, strip=False)
        if rest == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return ByteFallbackDecoder(raw, strip=True)
    return WindowDecoder(raw)


def _decoder_steps(raw: RawTokenizer) -> Iterable[dict[str, Any]]:
    decoder = raw.decoder
    if decoder is None:
        return
    tree = cast("dict[str, Any]", json.loads(decoder.__getstate__()))
    if tree.get("type") == "Sequence":
        yield from cast("list[dict[str, Any]]", tree["decoders"])
    else:
        yield tree


def decode_whole(stream: TextStream, token_ids: Iterable[int]) -> str:
    """All text of ``token_ids`` through a fresh stream."""
    return stream.push(list(token_ids)) + stream.flush()

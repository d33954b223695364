"""Text as it streams against the tokenizer's own decoding of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.checkpoint.byte_bpe import byte_alphabet
from octavo.frontend.text_stream import (
    ByteFallbackDecoder,
    ByteLevelDecoder,
    WindowDecoder,
    decode_whole,
    make_decoder,
)
from octavo.frontend.tokenizer import Tokenizer

from .conftest import make_tokenizer

TEXTS = st.text(
    st.one_of(
        st.sampled_from("the hello, world. \n▁"),
        st.sampled_from(["🤷🏽‍♀️", "👩‍👩‍👧", "é", "e\u0301", "世", "한", "\ufffd", "\x00"]).flatmap(st.sampled_from),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=40,
)
KINDS = ("byte_level", "window", "llama2", "gemma")
ALL = {kind: make_tokenizer(kind) for kind in (*KINDS, "wordpiece", "metaspace", "none")}


def fallback_reference(tokenizer: Tokenizer, ids: list[int], skip: bool, *, strip: bool) -> str:
    """Sentencepiece's convention with malformed bytes replaced as Unicode recommends."""
    written = b""
    for token_id in ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None or (skip and token_id in tokenizer.all_special_ids):
            continue
        byte = re.fullmatch("<0x(..)>", token)
        written += bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
    text = written.decode("utf-8", "replace")
    return text.removeprefix(" ") if strip else text


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        ("byte_level", ByteLevelDecoder),
        ("window", WindowDecoder),
        ("llama2", ByteFallbackDecoder),
        ("gemma", ByteFallbackDecoder),
        ("wordpiece", WindowDecoder),
        ("metaspace", WindowDecoder),
        ("none", WindowDecoder),
    ],
)
def test_the_kind_of_decoder_is_recognised(tokenizers: Callable[[str], Tokenizer], kind: str, decoder: type) -> None:
    assert type(make_decoder(tokenizers(kind)._raw)) is decoder


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=60)
def test_a_streamed_text_is_the_text(kind: str, text: str) -> None:
    """Red when a decoder loses, doubles or splits a character, or mistakes a space."""
    tokenizer = ALL[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream()
    pieces = [*(stream.push([token_id]) for token_id in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", sorted(ALL))
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=80)
def test_any_ids_stream_to_their_whole_decoding(kind: str, data: st.DataObject, skip: bool) -> None:
    """Ids that no encoder would write: broken UTF-8, special tokens anywhere, however many come at once. Where
    byte-fallback bytes are broken only the number of replacement characters may differ."""
    tokenizer = ALL[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    stream, step = tokenizer.stream(skip_special_tokens=skip), data.draw(st.integers(1, 5))
    streamed = "".join(stream.push(ids[start : start + step]) for start in range(0, len(ids), step)) + stream.flush()
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    if kind in ("llama2", "gemma") and "\ufffd" in whole:
        whole = fallback_reference(tokenizer, ids, skip, strip=kind == "llama2")
    # A window gives up waiting for a character after some tokens, and may then replace once more.
    assert streamed == whole or (kind == "window" and "\ufffd" in whole and "\ufffd" in streamed)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS.filter(lambda text: "\ufffd" not in text), answer=TEXTS.filter(lambda text: "\ufffd" not in text))
@settings(max_examples=60)
def test_an_answer_continues_its_prompt(kind: str, prompt: str, answer: str) -> None:
    """Text of prompt + text of the answer = text of both: no space is lost where they meet, no character is cut."""
    tokenizer = ALL[kind]
    ids = tokenizer.encode(prompt + "x" + answer, add_special_tokens=False)
    for cut in {1, len(ids) // 2, len(ids) - 1} - {0}:
        answer_text = decode_whole(tokenizer.stream(ids[:cut]), ids[cut:])
        prompt_text = decode_whole(tokenizer.stream(), ids[:cut])
        whole = tokenizer.decode(ids)
        if prompt_text.endswith("\ufffd") and not whole.startswith(prompt_text):
            prompt_text = prompt_text[:-1]  # the character that the answer completes is the answer's
        assert prompt_text + answer_text == whole


def test_characters_come_whole(byte_level: Tokenizer) -> None:
    family = "👩‍👩‍👧"
    ids = [byte_level.convert_tokens_to_ids(token) for token in _byte_tokens(family)]
    stream = byte_level.stream()
    assert [piece for i in ids if (piece := stream.push([i]))] == list(family)


def test_bytes_that_never_become_a_character_show_at_the_end(byte_level: Tokenizer) -> None:
    first = byte_level.convert_tokens_to_ids(_byte_tokens("世")[0])
    stream = byte_level.stream()
    assert stream.push([first]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_a_character_that_the_prompt_cut_and_nobody_goes_on_with(kind: str) -> None:
    """Its replacement belongs to the prompt's text, not to the answer's."""
    tokenizer = ALL[kind]
    cut = tokenizer.encode("世", add_special_tokens=False)[:-1]
    assert decode_whole(tokenizer.stream(cut), tokenizer.encode_inner("hello")) == "hello"
    assert decode_whole(tokenizer.stream(cut), []) == ""


def test_a_window_does_not_wait_forever() -> None:
    """Red when an endless row of broken bytes shows nothing and makes each step slower than the one before."""
    tokenizer = ALL["window"]
    stream = tokenizer.stream()
    byte = tokenizer.convert_tokens_to_ids(_byte_tokens("世")[0])
    assert byte is not None
    assert any(stream.push([byte]) for _ in range(20))


def test_an_id_beyond_the_vocabulary_gives_no_text(byte_level: Tokenizer) -> None:
    assert decode_whole(byte_level.stream(), [len(byte_level) + 5]) == ""


def test_a_token_alone_keeps_its_space(llama2: Tokenizer, byte_level: Tokenizer) -> None:
    the = llama2.convert_tokens_to_ids("▁the")
    assert the is not None
    assert llama2.token_text(the) == " the"
    byte = llama2.convert_tokens_to_ids("<0xE4>")
    assert byte is not None
    assert llama2.token_text(byte) == "\ufffd"
    part = byte_level.convert_tokens_to_ids(_byte_tokens("世")[0])
    assert byte_level.token_text(part) == "\ufffd"


def test_spaces_between_special_tokens_can_be_left_out(tokenizers: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizers("wordpiece")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "hello", "[SEP]")]
    for spaces, text in ((True, "[CLS] [SEP] hello [SEP]"), (False, "[CLS][SEP] hello [SEP]")):
        assert tokenizer.decode(ids, spaces_between_special_tokens=spaces) == text
        stream = tokenizer.stream(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert decode_whole(stream, ids) == text


def _byte_tokens(text: str) -> list[str]:
    spelt = byte_alphabet()
    return [spelt[byte] for byte in text.encode()]

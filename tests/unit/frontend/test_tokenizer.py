"""The names of transformers on our tokenizer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from octavo.errors import InvalidRequestError
from octavo.frontend.tokenizer import LONG_TEXT_CHARS, Tokenizer, load_tokenizer


def test_text_goes_there_and_back(byte_level: Tokenizer) -> None:
    text = "Hello 世界 🤷🏽‍♀️<|im_end|>"
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.decode(ids, skip_special_tokens=True) == "Hello 世界 🤷🏽‍♀️"
    assert byte_level(text).input_ids == byte_level(text)["input_ids"] == ids
    assert byte_level(text).attention_mask == [1] * len(ids)
    assert byte_level.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
    assert byte_level.convert_tokens_to_ids(["<|im_end|>", "no such token"]) == [byte_level.eos_token_id, None]
    assert byte_level.get_vocab()["<|im_end|>"] == byte_level.eos_token_id
    assert byte_level.all_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert len(byte_level) == byte_level.vocab_size + 3


def test_bos_is_added_where_the_model_wants_it(llama2: Tokenizer) -> None:
    assert llama2.adds_bos_token
    assert llama2.encode("hello")[0] == llama2.bos_token_id
    assert llama2.encode("hello", add_special_tokens=False)[0] != llama2.bos_token_id


def test_half_a_surrogate_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("a\ud800b")


def test_inner_text_has_no_space_put_before_it(llama2: Tokenizer, byte_level: Tokenizer) -> None:
    assert llama2.adds_prefix_space
    assert not byte_level.adds_prefix_space
    assert llama2.convert_ids_to_tokens(llama2.encode_inner("hello")) == ["hello"]
    assert llama2.convert_ids_to_tokens(llama2.encode_inner(" hello")) == ["▁hello"]
    assert byte_level.decode(byte_level.encode_inner("hello")) == "hello"


def test_the_embedded_model(smollm2_gguf: Path) -> None:
    """The real tokenizer and template: red when the GGUF reader and this class stop fitting together."""
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(messages, tokenize=True)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_long_text_gets_the_same_ids_and_holds_nobody_up(byte_level: Tokenizer) -> None:
    """Red when other threads stand still while a long prompt is encoded: every stream of a server would."""
    text = "Hello 世界 🤷🏽‍♀️<|im_end|> and on" * 200
    assert len(text) > LONG_TEXT_CHARS
    assert byte_level.encode(text) == byte_level.encode(text[:31]) * 200
    turns, is_over = 0, threading.Event()

    def live() -> None:
        nonlocal turns
        while not is_over.wait(0.001):
            turns += 1

    thread = threading.Thread(target=live)
    thread.start()
    while not turns:
        time.sleep(0.001)
    before = turns
    byte_level.encode(text * 60)
    during = turns - before
    is_over.set()
    thread.join()
    assert during >= 3

"""Tokenizers that Octavo rebuilds itself, against the libraries whose formats they are: 2,009 texts in 20 scripts.

Red when a token id differs, or when text that comes out id by id is not the text of the whole. The vocabularies are
those that ``mistral-common`` carries, and small ones trained here. For vocabularies of other models see
``test_vocabularies.py``.
"""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from octavo.checkpoint.byte_bpe import O200K_REGEX
from octavo.checkpoint.gguf_tokenizer import build_gguf_tokenizer
from octavo.checkpoint.sentencepiece_file import read_sentencepiece
from octavo.checkpoint.tiktoken_file import read_ranks
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.errors import CheckpointError
from octavo.frontend.tokenizer import Tokenizer
from tests.tokenization.gguf_words import byte_level_metadata, sentencepiece_metadata, word_piece_metadata
from tests.tokenization.small_tekken import small_tekken
from tests.tokenization.texts import SCRIPTS, sample_texts

DATA = Path(mistral_common.__file__).parent / "data"


def assert_same_ids(
    ours: Callable[[str], Sequence[int]], theirs: Callable[[str], Sequence[int]], texts: Sequence[str] = ()
) -> None:
    texts = texts or sample_texts()
    wrong = [text for text in texts if list(ours(text)) != list(theirs(text))]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts, such as {wrong[0]!r}"


def without_stacked_marks() -> list[str]:
    """In a compiled normalisation ``tokenizers`` looks a letter with several marks up as one; sentencepiece doesn't."""
    mark = [[unicodedata.category(sign)[0] == "M" for sign in text] for text in sample_texts()]
    stacked = [any(a and b for a, b in pairwise(flags)) for flags in mark]
    texts = [text for text, has in zip(sample_texts(), stacked, strict=True) if not has]
    assert len(texts) > 1000
    return texts


def assert_streams(tokenizer: Tokenizer, whole: Callable[[str, Sequence[int]], str]) -> None:
    """Text that comes id by id is that of the whole, and no part of it is half a character."""
    for text in sample_texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = tokenizer.stream()
        parts = [stream.push([token_id]) for token_id in ids]
        assert "".join([*parts, stream.flush()]) == whole(text, ids), repr(text)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts), repr(text)


def plain(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def test_texts_are_what_they_should_be() -> None:
    assert len(SCRIPTS) == 20
    assert len(set(sample_texts())) >= 2000
    joined = "".join(sample_texts())
    assert all(sign in joined for sign in ("\x00", "👩‍👩‍👧‍👦", "\u202e", "\r\n", "\U0010ffff"))


# --- tekken and tiktoken ---


@pytest.fixture(scope="module")
def tekken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 30,000 tokens of a real file: all of them would take five times as long."""
    return small_tekken(tmp_path_factory.mktemp("tekken"))


@pytest.fixture(scope="module")
def tekken(tekken_file: Path) -> Tokenizer:
    return Tokenizer(load_tokenizer_data(tekken_file))


def test_tekken_equals_mistral_common(tekken: Tokenizer, tekken_file: Path) -> None:
    theirs = Tekkenizer.from_file(tekken_file)
    assert_same_ids(plain(tekken), lambda text: theirs.encode(text, bos=False, eos=False))
    assert_streams(tekken, lambda text, ids: text)
    assert len(tekken) == theirs.n_words
    assert tekken.encode("a")[0] == theirs.bos_id == tekken.bos_token_id
    assert tekken.eos_token_id == theirs.eos_id
    assert tekken.encode("[INST]a", add_special_tokens=False)[0] == theirs.get_special_token("[INST]")


def test_gguf_of_tekken_equals_it(tekken: Tokenizer, tekken_file: Path) -> None:
    raw = load_tokenizer_data(tekken_file).tokenizer
    again = build_gguf_tokenizer(byte_level_metadata(raw, "tekken"), "m.gguf").tokenizer
    assert_same_ids(lambda text: again.encode(text, add_special_tokens=False).ids, plain(tekken))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": {}}, "config.pattern"),
        ({"vocab": []}, "vocab must be a list of at least 257"),
        ({"vocab": [{"rank": 0, "token_bytes": "%%"}] * 300}, "vocab entry 0: token_bytes is not base64"),
        ({"special_tokens": [{"rank": 7}]}, "special_tokens holds"),
        ({"special_tokens": [{"rank": 0, "token_str": "x"}, {"rank": 1, "token_str": "x"}]}, "holds a token twice"),
    ],
)
def test_broken_tekken_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes((i,))).decode()} for i in range(256)]
    vocab.append({"rank": 256, "token_bytes": base64.b64encode(b"ab").decode()})
    config = {"pattern": ".", "default_vocab_size": 259, "default_num_special_tokens": 2}
    whole = {"config": config, "vocab": vocab, "special_tokens": None}
    (tmp_path / "tekken.json").write_text(json.dumps(whole))
    assert load_tokenizer_data(tmp_path).tokenizer.encode("ab", add_special_tokens=False).ids == [2 + 97, 2 + 98]
    (tmp_path / "tekken.json").write_text(json.dumps(whole | change))
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer_data(tmp_path)


def test_tiktoken_file_equals_tiktoken(tmp_path: Path, tekken_file: Path) -> None:
    vocab = json.loads(tekken_file.read_text(encoding="utf-8"))["vocab"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in vocab}
    path = tmp_path / "o200k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    assert read_ranks(path) == ranks
    reference = tiktoken.Encoding("x", pat_str=O200K_REGEX, mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer(load_tokenizer_data(path))
    assert_same_ids(plain(ours), reference.encode_ordinary)


def test_tiktoken_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"".join(base64.b64encode(bytes((i,))) + b" %d\n" % i for i in range(9)))
    with pytest.raises(CheckpointError, match="no known family"):
        load_tokenizer_data(tmp_path)


# --- sentencepiece ---


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of Llama 2 or Mistral 7B: ``tokenizer.model`` and nothing that says more."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes((DATA / "tokenizer.model.v1").read_bytes())
    return folder


def test_sentencepiece_model_of_a_folder(llama_like: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(str(llama_like / "tokenizer.model"))
    ours = Tokenizer(load_tokenizer_data(llama_like))
    assert_same_ids(plain(ours), theirs.encode)
    assert_streams(ours, lambda text, ids: theirs.decode(list(ids)))
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    assert ours.encode("a")[0] == theirs.bos_id()
    raw = load_tokenizer_data(llama_like).tokenizer
    again = build_gguf_tokenizer(sentencepiece_metadata(raw, prefix_space=True), "m.gguf").tokenizer
    assert_same_ids(lambda text: again.encode(text, add_special_tokens=False).ids, theirs.encode)


def test_sentencepiece_model_with_control_tokens() -> None:
    """Mistral's own files: no second space before a text that begins with one, as their templates write it."""
    path = DATA / "mistral_instruct_tokenizer_241114.model.v7"
    theirs = sentencepiece.SentencePieceProcessor(str(path))
    ours = Tokenizer(load_tokenizer_data(path))
    texts = [text for text in sample_texts() if not text.startswith((" ", "\u2581"))]
    assert len(texts) > 1900
    assert_same_ids(plain(ours), theirs.encode, texts)


def train(**settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in sample_texts()[::7] if text.strip() and "\0" not in text),
        model_writer=model, vocab_size=4500, character_coverage=0.99, hard_vocab_limit=False, minloglevel=9,
        num_threads=1, **settings,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc", "add_dummy_prefix": False},
        {
            "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity", "user_defined_symbols": ["<tool>", "«x»"],
        },
    ],
    ids=["unigram-bytes", "unigram-nmt-nfkc", "bpe-nfkc-no-prefix", "bpe-user-defined"],
)  # fmt: skip
def test_trained_sentencepiece_models(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**settings))
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(load_tokenizer_data(tmp_path))
    compiled = settings["normalization_rule_name"] != "identity"
    assert_same_ids(plain(ours), theirs.encode, without_stacked_marks() if compiled else ())


def test_folder_facts_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """tokenizer_config.json adds tokens behind the pieces and says what stands before a text."""
    model = (DATA / "tokenizer.model.v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    added = {"32000": {"content": "<|im_start|>", "special": True}, "32001": {"content": "<code>", "special": False}}
    config = {"added_tokens_decoder": added, "add_eos_token": True, "pad_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(load_tokenizer_data(tmp_path))
    ids = tokenizer.encode("<|im_start|>a<code>")
    assert (ids[0], ids[1], ids[-2], ids[-1]) == (1, 32000, 32001, 2)
    assert 32000 in tokenizer.all_special_ids and 32001 not in tokenizer.all_special_ids
    assert tokenizer.pad_token_id == 32000
    added["32005"] = {"content": "<late>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gives '<late>' the id 32005, but the next free one is 32002"):
        load_tokenizer_data(tmp_path)


@pytest.mark.parametrize("cut", [1, 100, 5000, 400_000])
def test_truncated_sentencepiece_model_is_refused(cut: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizer.model.v1").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer_data(tmp_path)


def test_space_after_special_tokens_follows_the_legacy_flag(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizer.model.v1").read_bytes())
    old = load_tokenizer_data(tmp_path).tokenizer.encode("<s>a").tokens
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    new = load_tokenizer_data(tmp_path).tokenizer.encode("<s>a").tokens
    assert (old[-1], new[-1]) == ("▁a", "a")


# --- WordPiece and unigram in GGUF ---


def test_gguf_word_piece_equals_bert() -> None:
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    raw.decoder = decoders.WordPiece(prefix="##")  # type: ignore[assignment]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(
        sample_texts()[::3], trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    )
    again = build_gguf_tokenizer(word_piece_metadata(raw), "m.gguf")
    assert again.is_wordpiece
    assert_same_ids(
        lambda text: again.tokenizer.encode(text, add_special_tokens=False).ids,
        lambda text: raw.encode(text, add_special_tokens=False).ids,
    )
    assert again.special_token_ids == {0, 1, 2, 3, 4}


def test_gguf_unigram_equals_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram", normalization_rule_name="nmt_nfkc"))
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    metadata = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": model.tokens, "tokenizer.ggml.scores": model.scores,
        "tokenizer.ggml.token_type": model.types, "tokenizer.ggml.unknown_token_id": model.unknown_id,
        "tokenizer.ggml.precompiled_charsmap": [byte - 256 if byte > 127 else byte for byte in model.charsmap],
        "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True,
    }  # fmt: skip
    again = build_gguf_tokenizer(metadata, "m.gguf").tokenizer
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert_same_ids(
        lambda text: again.encode(text, add_special_tokens=False).ids, theirs.encode, without_stacked_marks()
    )

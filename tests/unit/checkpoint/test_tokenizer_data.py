"""Tokenizers from GGUF metadata and folders. Red when token ids differ from a plain restatement of the algorithm."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.tokenizer_data import TokenizerData, load_tokenizer_data
from octavo.errors import CheckpointError
from tests.unit.loader.builders import MERGES, TOKENS, TYPES, write_gguf

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_by_rank(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def texts(alphabet: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40))) for _ in range(count)]


# --- the embedded model ---


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> TokenizerData:
    return load_tokenizer_data(smollm2_gguf)


def test_smollm2_facts(smollm2: TokenizerData) -> None:
    assert smollm2.tokenizer.get_vocab_size() == 49152
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert (smollm2.add_bos_token, smollm2.add_eos_token) == (False, False)
    assert smollm2.special_token_ids == frozenset(range(17))
    assert "<|im_start|>" in smollm2.chat_templates["default"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  2", ["a", "ĠĠ", "2"]),
        ("year 2024", ["year", "Ġ", "2", "0", "2", "4"]),
        ("a\n\n1", ["a", "ĊĊ", "1"]),
        ("<|im_start|>user\nhi<|im_end|>", ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"]),
    ],
)
def test_smollm2_cuts_every_digit(smollm2: TokenizerData, text: str, tokens: list[str]) -> None:
    """Digits are cut before anything else, so spaces before a digit stay together (unlike in a plain GPT-2 split)."""
    assert smollm2.tokenizer.encode(text).tokens == tokens


def test_smollm2_equals_byte_level_bpe_by_hand(smollm2: TokenizerData, smollm2_gguf: Path) -> None:
    with GGUFFile(smollm2_gguf) as gguf:
        ids = {token: i for i, token in enumerate(gguf.metadata["tokenizer.ggml.tokens"])}
        lines = gguf.metadata["tokenizer.ggml.merges"]
    ranks = {(a, b): i for i, (a, b) in enumerate(line.split(" ") for line in lines)}
    alphabet = byte_alphabet()

    def by_hand(text: str) -> list[int]:
        result: list[int] = []
        for part in regex.split(r"(\p{N})", text):
            for word in regex.findall(GPT2, part):
                result += [ids[p] for p in merge_by_rank([alphabet[b] for b in word.encode()], ranks)]
        return result

    sentences = [
        "The quick brown fox doesn't jump over 12 lazy dogs.", "naïve café, Ünïcödé — “quotes”…",
        "中文字符 和 日本語 ½ ⅷ ٣",
        "def f(x):\n    return x ** 2  # 4 spaces\n\n\n", "\t\ttabs  and   spaces 1 ", "😀👩‍👩‍👧 🇩🇪",
        "I'LL don't we've 'tis",
        "a" * 200, "\r\n\r\n", "   leading", "trailing   ", "\u00a0\u2003wide\u3000",
    ]  # fmt: skip
    for text in [*sentences, *texts("abcde ETA12é中😀\n\t'.,", 150, seed=3)]:
        encoded = smollm2.tokenizer.encode(text).ids
        assert encoded == by_hand(text), text
        assert smollm2.tokenizer.decode(encoded, skip_special_tokens=False) == text


# --- byte-level pre-tokenisers ---


def byte_level_gguf(path: Path, **metadata: Any) -> Path:
    tokens = [*byte_alphabet().values(), "<s>", "</s>", "ab"]
    types = [1] * 256 + [3, 3, 1]
    base = {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.bos_token_id": 256,
    }  # fmt: skip
    write_gguf(path, metadata=base | {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    return path


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 12345 don't  x", ["ab", " 12345", " don", "'t", " ", " x"]),
        ("smollm", "ab 12345", ["ab", " ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", "ab 12345 DON'T\n\n x!!\n", ["ab", " ", "123", "45", " DON", "'T", "\n\n", " x", "!!\n"]),
        ("qwen2", "ab 123 don't\n x", ["ab", " ", "1", "2", "3", " don", "'t", "\n", " x"]),
    ],
)
def test_where_each_pre_tokeniser_cuts(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    data = load_tokenizer_data(byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    splitter = data.tokenizer.pre_tokenizer
    assert splitter is not None
    alphabet = byte_alphabet()
    expected = ["".join(alphabet[b] for b in piece.encode()) for piece in pieces]
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == expected
    ids = data.tokenizer.encode(text, add_special_tokens=False).ids
    assert data.tokenizer.decode(ids) == text


def test_bos_is_added_where_the_family_does(tmp_path: Path) -> None:
    llama3 = load_tokenizer_data(byte_level_gguf(tmp_path / "a.gguf", pre="llama-bpe"))
    assert llama3.add_bos_token
    assert llama3.tokenizer.encode("x").tokens == ["<s>", "x"]
    assert llama3.tokenizer.encode("x", add_special_tokens=False).tokens == ["x"]
    off = load_tokenizer_data(byte_level_gguf(tmp_path / "b.gguf", pre="llama-bpe", add_bos_token=False))
    assert off.tokenizer.encode("x").tokens == ["x"]
    both = load_tokenizer_data(
        byte_level_gguf(tmp_path / "c.gguf", pre="gpt-2", add_bos_token=True, add_eos_token=True)
    )
    assert both.tokenizer.encode("x").tokens == ["<s>", "x", "</s>"]


def test_qwen_normalises_and_others_do_not(tmp_path: Path) -> None:
    decomposed = "e\u0301"
    qwen = load_tokenizer_data(byte_level_gguf(tmp_path / "a.gguf", pre="qwen2")).tokenizer
    gpt2 = load_tokenizer_data(byte_level_gguf(tmp_path / "b.gguf", pre="gpt-2")).tokenizer
    assert qwen.decode(qwen.encode(decomposed).ids) == "\u00e9"
    assert gpt2.decode(gpt2.encode(decomposed).ids) == decomposed


def test_special_and_user_defined_tokens(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = load_tokenizer_data(path)
    encoded = data.tokenizer.encode("the<tool>the<|end|>")
    assert encoded.tokens == ["the", "<tool>", "the", "<|end|>"]
    assert data.special_token_ids == {TOKENS.index("<|end|>")}
    assert data.tokenizer.decode(encoded.ids, skip_special_tokens=True) == "the<tool>the"


def test_missing_pre_tokeniser_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_tokenizer_data(byte_level_gguf(tmp_path / "m.gguf", pre=None))
    assert "does not name its pre-tokeniser" in caplog.text


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
    ({"model": "t5"}, "tokenizer.ggml.scores must have"),
    ({"model": "bert"}, "holds no WordPiece vocabulary"),
    ({"model": None}, "carries no tokenizer"),
    ({"tokens": None}, "carries no tokenizer"),
    ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of str"),
    ({"tokens": "abc"}, "tokenizer.ggml.tokens must be a list of str"),
    ({"tokens": [*TOKENS[:-1], "the"]}, "holds 'the' twice"),
    ({"token_type": TYPES[:-1]}, "token_type has"),
    ({"pre": "magic"}, "tokenizer.ggml.pre is 'magic'"),
    ({"merges": None}, "without tokenizer.ggml.merges"),
    ({"merges": ["the"]}, "entry 0 is 'the', not two pieces"),
    ({"merges": [*MERGES, "x yy"]}, "do not fit the tokens"),
    ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000"),
    ({"bos_token_id": "<s>"}, "tokenizer.ggml.bos_token_id is '<s>'"),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be a boolean"),
]


@pytest.mark.parametrize(("metadata", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_wrong_metadata_is_refused(metadata: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata={f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer_data(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message


def test_template_must_be_text_and_may_have_names(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata={"tokenizer.chat_template.tool_use": "T"})
    assert load_tokenizer_data(path).chat_templates == {"default": "{{ messages }}", "tool_use": "T"}
    write_gguf(path, metadata={"tokenizer.chat_template": 7})
    with pytest.raises(CheckpointError, match="chat_template must be a string"):
        load_tokenizer_data(path)


# --- sentencepiece ---

WORDS = ["▁the", "▁th", "he", "th", "▁a", "ab", "abc", "bc", "▁abc", "cab", "▁▁", "é"]
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
SP_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS, *LETTERS]
SP_TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(LETTERS))]
SP_SCORES = [0.0] * 259 + [-float(i) for i in range(len(WORDS))] + [-100.0 - i for i in range(len(LETTERS))]


def sentencepiece_gguf(path: Path, **metadata: Any) -> Path:
    base: dict[str, Any] = {
        "model": "llama", "pre": None, "merges": None, "tokens": SP_TOKENS, "token_type": SP_TYPES,
        "scores": SP_SCORES, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    write_gguf(path, metadata={f"tokenizer.ggml.{k}": v for k, v in (base | metadata).items()} | {
        "llama.vocab_size": None,
    })  # fmt: skip
    return path


def sentencepiece_by_hand(text: str) -> list[int]:
    """Merge the adjacent pair whose union scores highest, leftmost first; bytes for what is no token."""
    ids = {token: i for i, token in enumerate(SP_TOKENS)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-SP_SCORES[ids[a + b]], i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
    result: list[int] = []
    for piece in pieces:
        result += [ids[piece]] if piece in ids else [ids[f"<0x{b:02X}>"] for b in piece.encode()]
    return result


def test_sentencepiece_equals_merging_by_score(tmp_path: Path) -> None:
    data = load_tokenizer_data(sentencepiece_gguf(tmp_path / "m.gguf"))
    assert data.add_bos_token
    for text in ["the cab", "abc  the", "é中", "X", *texts("abcthe é中\n", 200, seed=5)]:
        ids = data.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece_by_hand(text), text
        assert data.tokenizer.decode(ids) == text
    assert data.tokenizer.encode("a").ids[0] == 1


def test_sentencepiece_without_prefix_space(tmp_path: Path) -> None:
    data = load_tokenizer_data(sentencepiece_gguf(tmp_path / "m.gguf", add_space_prefix=False))
    assert data.tokenizer.encode("the", add_special_tokens=False).tokens == ["t", "he"]
    assert data.tokenizer.decode(data.tokenizer.encode(" a b").ids) == " a b"


@pytest.mark.parametrize("scores", [None, [0.0], [float("nan")] * len(SP_TOKENS)])
def test_sentencepiece_needs_scores(scores: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores"):
        load_tokenizer_data(sentencepiece_gguf(tmp_path / "m.gguf", scores=scores))


# --- Hugging Face folder ---


def write_folder(folder: Path, config: dict[str, Any] | None = None, template: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folder_facts_and_no_leftover_truncation(tmp_path: Path) -> None:
    data = load_tokenizer_data(
        write_folder(tmp_path, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "T"})
    )
    assert data.tokenizer.encode("hello world").ids == [3, 4]
    assert (data.bos_token_id, data.eos_token, data.eos_token_id) == (1, "</s>", 2)
    assert (data.add_bos_token, data.special_token_ids) == (False, {1, 2})
    assert data.chat_templates == {"default": "T"}


def test_folder_without_config_uses_the_special_tokens_map(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_tokenizer_data(tmp_path).eos_token_id == 2


@pytest.mark.parametrize(
    ("add_bos", "template", "ids"),
    [(None, True, [1, 3]), (None, False, [3]), (True, False, [1, 3]), (True, True, [1, 3]), (False, True, [3])],
)
def test_add_bos_token_wins_over_the_post_processor(
    add_bos: bool | None, template: bool, ids: list[int], tmp_path: Path
) -> None:
    config: dict[str, Any] = {"bos_token": "<s>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    data = load_tokenizer_data(write_folder(tmp_path, config, template))
    assert data.tokenizer.encode("hello").ids == ids
    assert data.add_bos_token == (ids[0] == 1)


def test_template_files_win(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"chat_template": [{"name": "default", "template": "old"}, {"name": "rag", "template": "R"}]}
    )
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    assert load_tokenizer_data(tmp_path).chat_templates == {"default": "new", "rag": "R", "tool_use": "U"}


def test_templates_of_processors(tmp_path: Path) -> None:
    """Multi-modal models keep theirs in files of their processors, in three forms."""
    write_folder(tmp_path, {"chat_template": "tokenizer's"})
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": {"default": "A", "tools": "B"}}))
    assert load_tokenizer_data(tmp_path).chat_templates == {"default": "A", "tools": "B"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "C"}))
    assert load_tokenizer_data(tmp_path).chat_templates == {"default": "C", "tools": "B"}
    (tmp_path / "chat_template.jinja").write_text("D")
    assert load_tokenizer_data(tmp_path).chat_templates == {"default": "D", "tools": "B"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(CheckpointError, match=r"chat_template\.json"):
        load_tokenizer_data(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "[1]", "not a tokenizer"),
        ("tokenizer.json", "\0\0", "not a tokenizer"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true or false"),
        ("tokenizer_config.json", '{"eos_token": 2}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"chat_template": 2}', "chat_template must be a string or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template entries"),
    ],
)
def test_broken_folder_names_the_file(file: str, text: str, reason: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {})
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer_data(tmp_path)
    assert file in caught.value.message
    assert reason in caught.value.message


def test_tokenizer_code_of_the_model_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_folder(
        tmp_path, {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "evil.Tokenizer"}
    )
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    load_tokenizer_data(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["spiece.model", "vocab.json"])
def test_slow_tokenizers_are_pointed_to_the_converter(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer.json; write one with transformers"):
        load_tokenizer_data(tmp_path)


def test_folder_with_one_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    assert load_tokenizer_data(tmp_path).eos_token == "<|end|>"

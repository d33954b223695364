"""Small tokenizers of each kind, built here: byte-level, sentencepiece-like with and without leading space, others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from octavo.checkpoint.tokenizer_data import TokenizerData
from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import FrontendConfig
from octavo.frontend.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "Hello world! Hello there, naïve café; über straße.",
    "你好，世界。こんにちは世界 안녕하세요",
    "🤷🏽‍♀️ 👩‍👩‍👧 🇨🇭 emoji",
    "stop STOP </s> ### User: Assistant:",
] * 3

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_data(
    raw: RawTokenizer, templates: Mapping[str, str] | None = None, *, bos: str | None = None, eos: str | None = None,
    add_bos: bool = False,
) -> TokenizerData:  # fmt: skip
    """TokenizerData around a raw tokenizer; with ``add_bos`` its post-processor puts BOS in front."""
    bos_id = raw.token_to_id(bos) if bos else None
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return TokenizerData(
        tokenizer=raw,
        bos_token=bos,
        eos_token=eos,
        bos_token_id=bos_id,
        eos_token_id=raw.token_to_id(eos) if eos else None,
        add_bos_token=add_bos,
        special_token_ids=frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special),
        chat_templates=templates or {},
    )


def byte_level_raw() -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False), AddedToken("世 界")])
    return raw


def sentencepiece_raw(*, prefix_space: bool) -> RawTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzHW,.!é"]
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix_space else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ending = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return raw


def _word_level_raw(decoder: decoders.Decoder | None) -> RawTokenizer:
    words = [
        "[UNK]",
        "[SEP]",
        "[CLS]",
        "un",
        "##aff",
        "##able",
        "hello",
        "world",
        "##s",
        "a",
        "##b",
        ",",
        "▁hi",
        "▁you",
    ]
    raw = RawTokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if decoder is not None:
        raw.decoder = decoder
    raw.add_special_tokens(["[UNK]", "[SEP]", "[CLS]"])
    return raw


def make_tokenizer(kind: str) -> Tokenizer:
    if kind == "byte_level":
        return Tokenizer(make_data(byte_level_raw(), {"default": CHATML}, eos="<|im_end|>"))
    if kind == "window":
        raw = byte_level_raw()
        raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
        return Tokenizer(make_data(raw))
    if kind == "llama2":
        return Tokenizer(make_data(sentencepiece_raw(prefix_space=True), bos="<s>", eos="</s>", add_bos=True))
    if kind == "gemma":
        return Tokenizer(make_data(sentencepiece_raw(prefix_space=False), bos="<s>", eos="</s>", add_bos=True))
    decoder = {"wordpiece": decoders.WordPiece(), "metaspace": decoders.Metaspace(), "none": None}[kind]
    return Tokenizer(make_data(_word_level_raw(decoder)))


@pytest.fixture(scope="session")
def tokenizers() -> Callable[[str], Tokenizer]:
    """Tokenizer of a kind, each built once."""
    made: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind not in made:
            made[kind] = make_tokenizer(kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def byte_level(tokenizers: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizers("byte_level")


@pytest.fixture(scope="session")
def llama2(tokenizers: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizers("llama2")


@pytest.fixture
def model_config(byte_level: Tokenizer) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=len(byte_level), hidden_size=64, intermediate_size=128,
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope=RopeConfig(), eos_token_ids=(7,),
    )  # fmt: skip


@pytest.fixture
def frontend_config() -> FrontendConfig:
    return FrontendConfig(
        served_model_names=("tiny",), tokenizer="", skip_tokenizer_init=False, chat_template=None, max_logprobs=20,
        logprobs_mode="raw_logprobs", sampling_defaults={"temperature": 0.5, "max_tokens": 9}, seed=3,
    )  # fmt: skip

"""A tiny Llama with random weights, and ways to run it; the real model as a Hugging Face folder for comparisons."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.loader.export import export_hf

VOCAB_SIZE = 211
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Hugging Face folder: the GGUF file's weights, dequantised to float32."""
    return export_hf(smollm2_gguf, tmp_path_factory.mktemp("smollm2"), "float32")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny Llama; the weights are dummies of a fixed seed."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture(scope="module")
def make_llm(tiny_model: Path) -> Iterator[MakeLLM]:
    """Start the tiny model with some settings; one engine per set of settings and module."""
    made: dict[str, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(
                str(tiny_model),
                **{
                    "load_format": "dummy",
                    "dtype": "float32",
                    "skip_tokenizer_init": True,
                    "num_threads": 1,
                    "num_gpu_blocks_override": 600,
                    **settings,
                },
            )
        return made[key]

    yield make
    for llm in made.values():
        llm.close()


def random_prompts(count: int, seed: int = 0, longest: int = 150) -> list[list[int]]:
    """Prompts of token ids, of very different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int = 24, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """Per prompt, per answer, the tokens."""
    return [[answer.token_ids for answer in output.outputs] for output in outputs]

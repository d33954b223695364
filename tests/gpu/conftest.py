"""What GPU tests share: they are skipped without a GPU; tiny models with random weights; engines on the device.

Run them with ``pytest -m gpu``. Nothing here needs a network or a checkpoint.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, RequestOutput, SamplingParams

VOCAB_SIZE = 500
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 128,
    "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
QWEN3 = {
    **LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {"llama": LLAMA, "qwen3": QWEN3}

MakeLLM = Callable[..., LLM]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, and skip it where there is no GPU."""
    here = Path(__file__).parent
    has_gpu = torch.cuda.is_available()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # of torch and Triton, not ours to mend
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a config each; weights are dummies of a fixed seed, the same on every device."""
    folders: dict[str, Path] = {}
    for name, config in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        (folders[name] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def make_llm(model_folders: dict[str, Path]) -> Iterator[MakeLLM]:
    """Start a tiny model with some settings; one engine per set of settings and module."""
    made: dict[str, LLM] = {}

    def make(model: str = "llama", **settings: Any) -> LLM:
        key = repr((model, sorted(settings.items())))
        if key not in made:
            made[key] = LLM(
                str(model_folders[model]),
                **{
                    "load_format": "dummy",
                    "dtype": "float32",
                    "device": "cuda",
                    "skip_tokenizer_init": True,
                    "num_gpu_blocks_override": 300,
                    "max_num_seqs": 64,
                    "in_process": True,
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
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]

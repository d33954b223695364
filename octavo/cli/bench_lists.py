"""The workloads W1 to W6 and W9 to W12 as token ids and output lengths, and the model shapes that they run on.

Every engine that is compared runs these very lists: seeds, draws and their order never change (a test holds digests).
Knows no engine, and no torch. ``bench_workloads.py`` runs them.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_TOP_ID = 10_000
"""Token ids are drawn from 0 to this, both included."""


@dataclass(frozen=True)
class Workload:
    """Requests that are submitted at once. The end-of-sequence token is ignored."""

    name: str
    model: str
    prompts: list[list[int]]
    output_lens: list[int]
    temperature: float

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        return max(len(prompt) + output for prompt, output in zip(self.prompts, self.output_lens, strict=True))


def _ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randint(0, _TOP_ID) for _ in range(length)]


def _w1() -> Workload:
    draw = random.Random(0)
    prompts = [_ids(draw, draw.randint(100, 1024)) for _ in range(256)]
    return Workload("W1", "m1", prompts, [draw.randint(100, 1024) for _ in range(256)], 0.6)


def _w2() -> Workload:
    draw = random.Random(0)
    prompts = [_ids(draw, 1024) for _ in range(1000)]
    return Workload("W2", "m2", prompts, [draw.randint(128, 384) for _ in range(1000)], 0.6)


def _w3() -> Workload:
    return Workload("W3", "m2", [_ids(random.Random(0), 128)], [256], 0.0)


def _w4() -> Workload:
    return replace(_w3(), name="W4", model="m1")


def _w5() -> Workload:
    draw = random.Random(0)
    return Workload("W5", "m2", [_ids(draw, 8192) for _ in range(64)], [1] * 64, 0.6)


def _w6() -> Workload:
    draw = random.Random(0)
    return Workload("W6", "m2", [_ids(draw, 512) for _ in range(256)], [512] * 256, 0.6)


def _w6_prefill() -> Workload:
    """What W6 spends before its second tokens."""
    workload = _w6()
    return replace(workload, name="W6-prefill", output_lens=[1] * len(workload.prompts))


def _w9() -> Workload:
    return replace(_w3(), name="W9", model="m3")


def _w10() -> Workload:
    draw = random.Random(0)
    return Workload("W10", "m3", [_ids(draw, 512) for _ in range(256)], [256] * 256, 0.6)


def _w11() -> Workload:
    return replace(_w3(), name="W11", model="m4")


def _w12() -> Workload:
    return replace(_w10(), name="W12", model="m4")


WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "W4": _w4,
    "W1": _w1,
    "W3": _w3,
    "W6": _w6,
    "W6-prefill": _w6_prefill,
    "W5": _w5,
    "W2": _w2,
    "W9": _w9,
    "W10": _w10,
    "W11": _w11,
    "W12": _w12,
}
"""By name, in the order in which a run with little time takes them: the small model first, then by what a second tells
about an engine."""
OPTIONAL: Sequence[str] = ("W9", "W10", "W11", "W12")
"""Not among ``all``: their models take 61 and 24 GB, and no peer has run them."""
DESCRIPTIONS: Mapping[str, str] = {
    "W1": "256 requests, prompt and answer uniform in 100..1024",
    "W2": "1000 requests, prompt 1024, answer uniform in 128..384",
    "W3": "batch 1, prompt 128, answer 256, greedy",
    "W4": "batch 1, prompt 128, answer 256, greedy",
    "W5": "prefill only: 64 prompts of 8192",
    "W6": "256 requests, prompt 512, answer 512",
    "W6-prefill": "256 prompts of 512, one token each",
    "W9": "mixture of experts, batch 1, prompt 128, answer 256, greedy",
    "W10": "mixture of experts, 256 requests, prompt 512, answer 256",
    "W11": "local and global layers, batch 1, prompt 128, answer 256, greedy",
    "W12": "local and global layers, 256 requests, prompt 512, answer 256",
}


MODEL_OF: Mapping[str, str] = {
    "W1": "m1", "W2": "m2", "W3": "m2", "W4": "m1", "W5": "m2", "W6": "m2", "W6-prefill": "m2",
    "W9": "m3", "W10": "m3", "W11": "m4", "W12": "m4",
}  # fmt: skip
"""Known without making the lists, which takes up to a second."""


@functools.cache
def make_workload(name: str, scale: str = "full") -> Workload:
    """One of WORKLOADS; at scale ``tiny`` a few requests with an eighth of the tokens, to try out the machinery."""
    workload = WORKLOADS[name]()
    if scale == "full":
        return workload
    count = min(len(workload.prompts), 6)
    return replace(
        workload,
        prompts=[prompt[: max(2, len(prompt) // 32)] for prompt in workload.prompts[:count]],
        output_lens=[length if length == 1 else max(2, length // 32) for length in workload.output_lens[:count]],
    )


M1: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
"""The shape of Qwen3-0.6B."""
M2: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
"""The shape of Llama-3.1-8B."""
M3: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
"""The shape of Qwen3-30B-A3B."""
M4: Mapping[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "bos_token_id": 2, "eos_token_id": 106,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3840, "intermediate_size": 15360,
    "max_position_embeddings": 131072, "model_type": "gemma3_text", "num_attention_heads": 16,
    "num_hidden_layers": 48, "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000.0,
    "sliding_window": 1024, "sliding_window_pattern": 6, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 262208,
}  # fmt: skip
"""The shape of the text half of Gemma-3-12B."""
MODELS: Mapping[str, Mapping[str, Any]] = {"m1": M1, "m2": M2, "m3": M3, "m4": M4}
MAX_MODEL_LENS: Mapping[str, int] = {"m1": 4096, "m2": 8448, "m3": 4096, "m4": 4096}
"""Context of the engine, as in the runs of the peers."""
_TINY: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 10_240, "bos_token_id": 1, "eos_token_id": 2,
    "max_window_layers": 2, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def model_config(name: str, scale: str = "full") -> dict[str, Any]:
    """The ``config.json`` of a model shape."""
    config = dict(MODELS[name])
    return config if scale == "full" else {**config, **{key: _TINY[key] for key in _TINY if key in config}}


def write_model(folder: Path, name: str, scale: str = "full") -> Path:
    """A folder that says the shape and nothing else: weights are random, prompts are token ids. Returns it."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model_config(name, scale), indent=1), encoding="utf-8")
    (path / "generation_config.json").write_text("{}", encoding="utf-8")
    return path

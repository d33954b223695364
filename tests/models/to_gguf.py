"""A tiny converter from transformers' checkpoints to GGUF, for tests: what llama.cpp's converter does, restated.

Names come from the table of the ``gguf`` package, not from ours. The rest is what that converter does to values and
metadata in each family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.loader.builders import write_gguf_file

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "mixtral": MODEL_ARCH.LLAMA,
    "smollm3": MODEL_ARCH.SMOLLM3, "granite": MODEL_ARCH.GRANITE, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE, "qwen3_moe": MODEL_ARCH.QWEN3MOE, "olmo2": MODEL_ARCH.OLMO2,
    "olmo3": MODEL_ARCH.OLMO2, "olmoe": MODEL_ARCH.OLMOE, "phi": MODEL_ARCH.PHI2, "phi3": MODEL_ARCH.PHI3,
    "granitemoe": MODEL_ARCH.GRANITE_MOE, "gpt_oss": MODEL_ARCH.GPT_OSS,
    "gemma": MODEL_ARCH.GEMMA, "gemma2": MODEL_ARCH.GEMMA2, "gemma3_text": MODEL_ARCH.GEMMA3, "bert": MODEL_ARCH.BERT,
}  # fmt: skip
PERMUTED = frozenset({"llama", "mistral", "mixtral", "smollm3", "granite", "granitemoe"})
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(.*)\.experts\.(\d+)\.(\w+)\.weight")
_STACKS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


def write_hf_gguf(model: PreTrainedModel, folder: Path, path: Path, **metadata: Any) -> None:
    """Write a saved checkpoint as GGUF.

    Args:
        model: For its config.
        folder: Where it was saved.
        path: The file to write.
        metadata: Further keys; a name without a dot is one of the architecture's.
    """
    config = model.config
    kind = config.model_type
    arch = ARCHITECTURES[kind]
    name = gguf.MODEL_ARCH_NAMES[arch]
    keys = {f"{name}.{key}": value for key, value in (_keys(config) | _FAMILY.get(kind, _none)(config)).items()}
    tensors: dict[str, np.ndarray] = {}
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for hf_name, tensor in _tensors(folder, kind, config):
        found = hf_name if hf_name.startswith("blk.") else names.get_name(hf_name, (".weight", ".bias"))
        assert found is not None, hf_name
        # The converter squeezes everything: a matrix of one row becomes a vector.
        tensors[found] = np.ascontiguousarray(tensor.squeeze().float().numpy())
    write_gguf_file(path, name, keys | metadata, tensors | _rope_tensors(config))


def _tensors(folder: Path, kind: str, config: Any) -> Iterator[tuple[str, Tensor]]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        is_tied = name == "lm_head.weight" and config.tie_word_embeddings
        if is_tied or (kind == "bert" and ("pooler." in name or "position_ids" in name)):
            continue
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer, _, index, word = expert.groups()
            stacks.setdefault(f"blk.{layer}.{_STACKS[word]}.weight", {})[int(index)] = tensor
            continue
        stacked = _stacked(name, tensor)
        if stacked:
            yield from stacked.items()
            continue
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if kind in PERMUTED and ".q_proj." in name:
            tensor = permute(tensor, config.num_attention_heads)
        if kind in PERMUTED and ".k_proj." in name:
            tensor = permute(tensor, config.num_key_value_heads)
        yield name, tensor
    for name, members in stacks.items():
        yield name, torch.stack([members[index] for index in range(len(members))])


def _stacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What has other shapes or names: experts in one tensor (gpt-oss's: columns first, halves interleaved), sinks."""
    layer = f"blk.{name.split('.')[2]}" if name.startswith("model.layers.") else ""
    kind = "bias" if name.endswith("_bias") else "weight"
    word = name.rsplit(".", 1)[-1].removesuffix("_bias")
    if ".experts." in name and word in ("gate_up_proj", "down_proj"):
        rows = tensor if kind == "bias" else tensor.transpose(1, 2)
        if word == "down_proj":
            return {f"{layer}.ffn_down_exps.{kind}": rows}
        return {f"{layer}.ffn_gate_exps.{kind}": rows[:, ::2], f"{layer}.ffn_up_exps.{kind}": rows[:, 1::2]}
    if name.endswith("input_linear.weight"):
        gate, up = tensor.chunk(2, dim=1)
        return {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
    if name.endswith(".sinks"):
        return {f"{layer}.attn_sinks.weight": tensor}
    return {}


def permute(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head: value ``i`` of the first half beside value ``i`` of the second."""
    rows = tensor.shape[0] // num_heads
    order = [
        head * rows + half * (rows // 2) + i for head in range(num_heads) for i in range(rows // 2) for half in (0, 1)
    ]
    return tensor[order]


def _keys(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    rotary = int(head_dim * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1))
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "vocab_size": config.vocab_size,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
    }  # fmt: skip
    if not rope:
        return keys
    if head_dim != config.hidden_size // heads:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    keys |= {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotary}
    if getattr(config, "rms_norm_eps", None) is not None:
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope["rope_type"] == "yarn":
            keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def _none(config: Any) -> dict[str, Any]:
    return {}


def _experts(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    keys: dict[str, Any] = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if getattr(config, "moe_intermediate_size", None):
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if getattr(config, "shared_expert_intermediate_size", None):
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return keys


def _granite(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": float(config.attention_multiplier), "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier), "logit_scale": float(config.logits_scaling),
    }  # fmt: skip


def _phi3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        wide = math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))
        keys["rope.scaling.attn_factor"] = wide if scale > 1 else 1.0
    return keys


def _bert(config: Any) -> dict[str, Any]:
    return {
        "attention.layer_norm_epsilon": float(config.layer_norm_eps), "attention.causal": False, "pooling_type": 1,
    }  # fmt: skip


_FAMILY: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mixtral": _experts,
    "qwen2_moe": _experts,
    "qwen3_moe": _experts,
    "olmoe": _experts,
    "granite": _granite,
    "granitemoe": lambda c: _granite(c) | _experts(c),
    "gpt_oss": lambda c: {
        **_experts(c), "attention.sliding_window": c.sliding_window, "expert_feed_forward_length": c.intermediate_size,
    },
    "olmo3": lambda c: {"attention.sliding_window": c.sliding_window},
    "phi": lambda c: {"attention.layer_norm_epsilon": float(c.layer_norm_eps)},
    "phi3": _phi3,
    "gemma2": lambda c: {
        "attn_logit_softcapping": float(c.attn_logit_softcapping),
        "final_logit_softcapping": float(c.final_logit_softcapping), "attention.sliding_window": c.sliding_window,
    },
    "gemma3_text": lambda c: {"attention.sliding_window": c.sliding_window},
    "bert": _bert,
}  # fmt: skip


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], dtype=np.float32)
            for kind in ("short", "long")
        }
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, config.head_dim)}
    return {}


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    long = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    short = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors: list[float] = []
    for wavelength in 2 * math.pi / frequencies:
        if wavelength < short:
            factors.append(1.0)
        elif wavelength > long:
            factors.append(rope["factor"])
        else:
            blend = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1.0 / ((1 - blend) / rope["factor"] + blend))
    return np.array(factors, dtype=np.float32)

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
    "phimoe": MODEL_ARCH.PHIMOE, "deepseek_v2": MODEL_ARCH.DEEPSEEK2, "deepseek_v3": MODEL_ARCH.DEEPSEEK2,
    "granitemoe": MODEL_ARCH.GRANITE_MOE, "gpt_oss": MODEL_ARCH.GPT_OSS,
    "gemma": MODEL_ARCH.GEMMA, "gemma2": MODEL_ARCH.GEMMA2, "gemma3_text": MODEL_ARCH.GEMMA3, "bert": MODEL_ARCH.BERT,
    "modernbert": MODEL_ARCH.MODERN_BERT, "xlm-roberta": MODEL_ARCH.BERT,
}  # fmt: skip
PERMUTED = frozenset({"llama", "mistral", "mixtral", "smollm3", "granite", "granitemoe"})
ENCODERS = frozenset({"bert", "xlm-roberta"})
LATENT = frozenset({"deepseek_v2", "deepseek_v3"})
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(.*)\.experts\.(\d+)\.(\w+)\.weight")
_STACKS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


def write_hf_gguf(
    model: PreTrainedModel, folder: Path, path: Path, arch: MODEL_ARCH | None = None, is_old: bool = False,
    **metadata: Any,
) -> None:  # fmt: skip
    """Write a saved checkpoint as GGUF.

    Args:
        model: For its config.
        folder: Where it was saved.
        path: The file to write.
        arch: Of the file, if not the usual one of the model.
        is_old: DeepSeek as converters wrote it before May 2025: keys and values together, fewer keys.
        metadata: Further keys.
    """
    config = model.config
    kind = config.model_type
    arch = arch or ARCHITECTURES[kind]
    name = gguf.MODEL_ARCH_NAMES[arch]
    keys = {f"{name}.{key}": value for key, value in (_keys(config) | _FAMILY.get(kind, _none)(config)).items()}
    if is_old:
        keys = {key: value for key, value in keys.items() if not key.endswith(_NEWER)}
        keys |= {f"{name}.{key}": value for key, value in _old_heads(config).items()}
    tensors: dict[str, np.ndarray] = {}
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for hf_name, tensor in _tensors(folder, kind, config, is_old):
        found = hf_name if hf_name.startswith("blk.") else names.get_name(hf_name, (".weight", ".bias"))
        assert found is not None, hf_name
        # The converter squeezes everything: a matrix of one row becomes a vector.
        tensors[found] = np.ascontiguousarray(tensor.squeeze().float().numpy())
    write_gguf_file(path, name, keys | metadata, tensors | _rope_tensors(config))


def _tensors(folder: Path, kind: str, config: Any, is_old: bool) -> Iterator[tuple[str, Tensor]]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        is_tied = name == "lm_head.weight" and config.tie_word_embeddings
        if is_tied or (kind in ENCODERS and ("pooler." in name or "position_ids" in name)):
            continue
        if kind == "xlm-roberta" and "position_embeddings" in name:
            tensor = tensor[config.pad_token_id + 1 :]  # those before are never used
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer, _, index, word = expert.groups()
            stacks.setdefault(f"blk.{layer}.{_STACKS[word]}.weight", {})[int(index)] = tensor
            continue
        stacked = _stacked(name, tensor)
        if stacked:
            yield from stacked.items()
            continue
        if kind in LATENT and not is_old and name.endswith(".kv_b_proj.weight"):
            yield from _latent_halves(name, tensor, config)
            continue
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), _changed(name, tensor, kind, config)
    for name, members in stacks.items():
        yield name, torch.stack([members[index] for index in range(len(members))])


def _changed(name: str, tensor: Tensor, kind: str, config: Any) -> Tensor:
    """With Gemma's 1 of norms; queries and keys as llama.cpp rotates them."""
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    heads = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"} if kind in PERMUTED else {}
    return next((permute(tensor, getattr(config, heads[word])) for word in heads if word in name), tensor)


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


def _latent_halves(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Keys and values of each head apart, keys turned around."""
    heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), values


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
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        wide = math.sqrt(1 + math.log(scale) / math.log(original))
        keys["rope.scaling.attn_factor"] = wide if scale > 1 else 1.0
    return keys


def _bert(config: Any) -> dict[str, Any]:
    return {
        "attention.layer_norm_epsilon": float(config.layer_norm_eps), "attention.causal": False, "pooling_type": 1,
    }  # fmt: skip


def _deepseek(config: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor), "leading_dense_block_count": 1,
        "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
        "attention.kv_lora_rank": config.kv_lora_rank, "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim, "rope.dimension_count": config.qk_rope_head_dim,
    }  # fmt: skip
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.norm_topk_prob:
        keys["expert_weights_norm"] = True
    if config.rope_parameters.get("mscale_all_dim") is not None:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * config.rope_parameters["mscale_all_dim"]
    return keys


_NEWER = ("_mla", "expert_group_count", "expert_group_used_count", "expert_gating_func")


def _old_heads(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.num_attention_heads, "attention.value_length": config.v_head_dim,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
    }  # fmt: skip


def _modern_bert(config: Any) -> dict[str, Any]:
    ropes = config.rope_parameters
    return {
        "attention.layer_norm_epsilon": float(config.norm_eps), "attention.causal": False, "pooling_type": 2,
        "attention.sliding_window": config.local_attention, "attention.sliding_window_pattern": 2,
        "rope.freq_base": float(ropes["full_attention"]["rope_theta"]), "rope.scaling.type": "none",
        "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
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
    "phimoe": lambda c: _phi3(c) | _experts(c),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma2": lambda c: {
        "attn_logit_softcapping": float(c.attn_logit_softcapping),
        "final_logit_softcapping": float(c.final_logit_softcapping), "attention.sliding_window": c.sliding_window,
    },
    "gemma3_text": lambda c: {"attention.sliding_window": c.sliding_window},
    "bert": _bert,
    "xlm-roberta": lambda c: {
        **_bert(c), "pooling_type": 2, "context_length": c.max_position_embeddings - c.pad_token_id - 1,
    },
    "modernbert": _modern_bert,
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

"""What each architecture of GGUF is called in config.json, and what its header says beside what all say.

One entry of ``FAMILIES`` each. Some things a header leaves out because they belong to the family: those are here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from octavo.checkpoint.gguf_header import GGUFHeader


def _nothing(header: GGUFHeader, config: dict[str, Any]) -> None:
    """A family that has no more than all have."""


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture of GGUF is called in config.json, and what it has of its own."""

    architecture: str
    model_type: str
    hidden_act: str = "silu"
    add: Callable[[GGUFHeader, dict[str, Any]], None] = _nothing
    has_experts: bool = False
    has_latent_heads: bool = False
    """Keys and values come from latent vectors; their sizes stand in keys of their own."""


def _llama(header: GGUFHeader, config: dict[str, Any]) -> None:
    """Llama and Mistral; with experts it is Mixtral."""
    if header.get("attention.temperature_scale") is not None:
        raise header.error(f"{header.prefix}.attention.temperature_scale is set, which is not supported")
    if not header.get("expert_count"):
        return
    config["architectures"], config["model_type"] = ["MixtralForCausalLM"], "mixtral"
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])


def _mistral(header: GGUFHeader, config: dict[str, Any]) -> None:
    if header.get("expert_count"):
        raise header.error(f"{header.prefix}.expert_count is set: this family's experts cannot be read")
    _llama(header, config)
    config.setdefault("sliding_window", 0)


def _granite(header: GGUFHeader, config: dict[str, Any]) -> None:
    for key, name in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        if header.get(key) is not None:
            config[name] = header.get(key)


def _granitemoe(header: GGUFHeader, config: dict[str, Any]) -> None:
    if header.get("expert_shared_feed_forward_length"):
        raise header.error(f"{header.prefix}.expert_shared_feed_forward_length is set, which is not supported")
    _granite(header, config)
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])


def _gpt_oss(header: GGUFHeader, config: dict[str, Any]) -> None:
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])
    if config.get("rope_scaling"):
        config["rope_scaling"]["truncate"] = False  # not in the header: it belongs to the family


def _olmo2(header: GGUFHeader, config: dict[str, Any]) -> None:  # noqa: ARG001
    """Olmo 3 has the same name and a window; its long-range layers alone are scaled."""
    if config.get("sliding_window"):
        config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"
        config["rope_local_base_freq"] = config["rope_theta"]


_NORMALISED = ("qwen3moe", "qwen3vlmoe")


def _experts(header: GGUFHeader, config: dict[str, Any]) -> None:
    config["num_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    inner = header.gguf.tensors.get("blk.0.ffn_gate_exps.weight")
    if inner is None or len(inner.shape) != 3:
        raise header.error("is missing or no stack of experts", "blk.0.ffn_gate_exps.weight")
    config["moe_intermediate_size"] = header.integer("expert_feed_forward_length", inner.shape[1])
    # Not in the header: it belongs to the family.
    config["norm_topk_prob"] = header.get("expert_weights_norm", header.prefix in _NORMALISED)
    shared = header.gguf.tensors.get("blk.0.ffn_gate_shexp.weight")
    if shared is not None:
        config["shared_expert_intermediate_size"] = shared.shape[0]


def _olmoe(header: GGUFHeader, config: dict[str, Any]) -> None:
    _experts(header, config)
    config["intermediate_size"] = config["moe_intermediate_size"]


def _phi2(header: GGUFHeader, config: dict[str, Any]) -> None:  # noqa: ARG001
    config.pop("attention_bias")


def _phi3(header: GGUFHeader, config: dict[str, Any]) -> None:
    # Old converters wrote the window of models that were trained without one as 0 or not at all.
    if "rope_scaling" in config and header.get("attention.sliding_window") is None:
        config["sliding_window"] = None


_PHIMOE_MAGNITUDE = 1.243163121016122
"""Phi-3.5-MoE's ``short_mscale`` and ``long_mscale``, which a header does not have: llama.cpp's converter writes a
magnitude by Phi-3's rule, which this family does not follow."""


def _phimoe(header: GGUFHeader, config: dict[str, Any]) -> None:
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])
    config["lm_head_bias"] = "output.bias" in header.gguf.tensors
    if "rope_scaling" in config:
        config["rope_scaling"].pop("attention_factor", None)
        config["rope_scaling"] |= {"short_mscale": _PHIMOE_MAGNITUDE, "long_mscale": _PHIMOE_MAGNITUDE}


_SIGMOID = 2
_DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Number of experts to groups and those chosen, for files from before the header said it: V2 and V3 have these."""


def _deepseek2(header: GGUFHeader, config: dict[str, Any]) -> None:
    """DeepSeek-V2; with sigmoid scores it is V3."""
    if header.get("attention.temperature_scale") is not None:
        raise header.error(f"{header.prefix}.attention.temperature_scale is set, which is not supported")
    # A correction of the choice goes with sigmoid scores; some files have nothing else that tells.
    corrects = any(name.endswith(".exp_probs_b.bias") for name in header.gguf.tensors)
    is_v3 = header.get("expert_gating_func", _SIGMOID if corrects else 0) == _SIGMOID
    if is_v3:
        config["architectures"], config["model_type"] = ["DeepseekV3ForCausalLM"], "deepseek_v3"
    head_dim, rotary_dim = config.pop("head_dim"), header.integer("rope.dimension_count")
    config.pop("partial_rotary_factor", None)
    has_own_sizes = header.get("attention.value_length_mla") is not None
    experts = header.integer("expert_count")
    groups, top_groups = _DEEPSEEK_GROUPS.get(experts, (1, 1))
    groups = header.integer("expert_group_count", groups)
    is_grouped = groups > 1
    config |= {
        "q_lora_rank": header.get("attention.q_lora_rank"),
        "kv_lora_rank": header.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary_dim,
        "qk_nope_head_dim": head_dim - rotary_dim,
        "v_head_dim": header.integer("attention.value_length_mla" if has_own_sizes else "attention.value_length"),
        "first_k_dense_replace": header.integer("leading_dense_block_count", 0),
        "n_routed_experts": experts,
        "num_experts_per_tok": header.integer("expert_used_count"),
        "moe_intermediate_size": header.integer("expert_feed_forward_length"),
        "n_shared_experts": header.integer("expert_shared_count", 0),
        "routed_scaling_factor": header.get("expert_weights_scale", 1.0),
        "norm_topk_prob": header.get("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": header.integer("expert_group_used_count", top_groups) if is_grouped else 1,
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in header.gguf.tensors,
    }
    if not is_v3:
        config["topk_method"] = "group_limited_greedy" if is_grouped else "greedy"
    if "rope_scaling" in config and header.get("rope.scaling.yarn_log_multiplier") is not None:
        # The converter multiplies by 0.1; the other of the two is the same in all released models.
        magnitude = header.number("rope.scaling.yarn_log_multiplier") * 10.0
        config["rope_scaling"] |= {"mscale": magnitude, "mscale_all_dim": magnitude}


_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
"""The largest models of the two families scale queries by the width of the model, which their files do not say."""


def _gemma2(header: GGUFHeader, config: dict[str, Any]) -> None:
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if header.get(key) is not None:
            config[name] = header.get(key)
    _gemma_scale(config, _GEMMA2_27B_LAYERS)


def _gemma3(header: GGUFHeader, config: dict[str, Any]) -> None:
    config["final_logit_softcapping"] = header.get("final_logit_softcapping")
    if header.get("rope.freq_base") is None:
        config["rope_theta"] = 1e6
    config["rope_local_base_freq"] = header.get("rope.freq_base_swa", 1e4)
    _state_layer_kinds(header, config, "sliding_window_pattern")
    _gemma_scale(config, _GEMMA3_27B_LAYERS)


def _gemma_scale(config: dict[str, Any], layers_of_largest: int) -> None:
    is_largest = config["num_hidden_layers"] == layers_of_largest
    width = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    config["query_pre_attn_scalar"] = width


def _bert(header: GGUFHeader, config: dict[str, Any]) -> None:
    types = header.gguf.tensors.get("token_types.weight")
    # Written as a vector where there is only one.
    config["type_vocab_size"] = types.shape[0] if types is not None and len(types.shape) == 2 else 1
    if header.get("attention.causal"):
        raise header.error(f"{header.prefix}.attention.causal is set, which is not supported")


def _modern_bert(header: GGUFHeader, config: dict[str, Any]) -> None:
    config["norm_eps"] = config.pop("layer_norm_eps", 1e-5)
    config["hidden_activation"] = header.get("hidden_activation", "gelu")
    config["global_rope_theta"] = config.pop("rope_theta")
    config["local_rope_theta"] = header.get("rope.freq_base_swa", 1e4)
    window = config.pop("sliding_window", None)
    if window is None:
        raise header.error(f"the metadata key {header.prefix}.attention.sliding_window is missing")
    config["local_attention"] = window
    _state_layer_kinds(header, config, "global_attn_every_n_layers")


def _state_layer_kinds(header: GGUFHeader, config: dict[str, Any], name: str) -> None:
    """Which layers are local: one by one, or as every how manieth is not (the field ``name``)."""
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if local else "full_attention" for local in cast("list[Any]", pattern)]
        config["layer_types"] = kinds
    elif pattern is not None:
        config[name] = pattern


_GELU = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", add=_llama, has_experts=True),
    "mistral3": Family("MistralForCausalLM", "mistral", add=_mistral, has_experts=True),
    "granite": Family("GraniteForCausalLM", "granite", add=_granite),
    "granitemoe": Family("GraniteMoeForCausalLM", "granitemoe", add=_granitemoe, has_experts=True),
    "gpt-oss": Family("GptOssForCausalLM", "gpt_oss", add=_gpt_oss, has_experts=True),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3"),
    "olmo2": Family("Olmo2ForCausalLM", "olmo2", add=_olmo2),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": Family("Qwen2MoeForCausalLM", "qwen2_moe", add=_experts, has_experts=True),
    "qwen3moe": Family("Qwen3MoeForCausalLM", "qwen3_moe", add=_experts, has_experts=True),
    "qwen2vl": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3vl": Family("Qwen3ForCausalLM", "qwen3"),
    "qwen3vlmoe": Family("Qwen3MoeForCausalLM", "qwen3_moe", add=_experts, has_experts=True),
    "olmoe": Family("OlmoeForCausalLM", "olmoe", add=_olmoe, has_experts=True),
    "phi2": Family("PhiForCausalLM", "phi", "gelu_new", add=_phi2),
    "phi3": Family("Phi3ForCausalLM", "phi3", add=_phi3),
    "phimoe": Family("PhimoeForCausalLM", "phimoe", add=_phimoe, has_experts=True),
    "deepseek2": Family(
        "DeepseekV2ForCausalLM", "deepseek_v2", add=_deepseek2, has_experts=True, has_latent_heads=True
    ),
    "gemma": Family("GemmaForCausalLM", "gemma", _GELU),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", _GELU, add=_gemma2),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", _GELU, add=_gemma3),
    "bert": Family("BertModel", "bert", "gelu", add=_bert),
    "modern-bert": Family("ModernBertModel", "modernbert", "gelu", add=_modern_bert),
}
"""By ``general.architecture``."""

"""Every family and variant that Octavo computes itself, as tiny random checkpoints of transformers' own classes.

``tests/models/test_families.py`` proves each, ``tests/gpu/test_families.py`` one of each family on a GPU, and
``python -m tests.models.families`` writes the table of docs/models.md out of this list.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN, _END = "<!-- table: python -m tests.models.families -->", "<!-- end of table -->"
SMALL: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attn_implementation": "eager", "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 24
"""Not a multiple of the block size; prompts of the tests are several times as long."""


@dataclass(frozen=True)
class Variant:
    """One way in which a family's config may look."""

    family: str
    architecture: str
    """transformers' class."""
    config: str
    """transformers' config class."""
    feature: str
    """What distinguishes the variant, for people."""
    models: str = ""
    """Released models that look so."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Over ``SMALL``."""
    wrap: Mapping[str, Any] | None = None
    """Config fields of the multimodal model around it, ``config`` being that of its text half; None for none."""
    shortest: int = 3
    """Least prompt length for which transformers computes what the engine does for all lengths."""
    max_model_len: int = 208
    is_on_gpu: bool = False
    """Stands for its family in the GPU tests."""


_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


def _longrope(half: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)], "original_max_position_embeddings": 64, **more,
    }  # fmt: skip


_TINY_SIGLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
_TINY_PIXTRAL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "head_dim": 8, "model_type": "pixtral",
}  # fmt: skip
_TINY_QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48,
    "fullatt_block_indexes": [0],
}  # fmt: skip
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

_LATENT: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 6,
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "llama-mha": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "as many KV heads as heads", "Llama 1, Llama 2 7B and 13B, Vicuna",
        {"num_key_value_heads": 6, "tie_word_embeddings": False},
    ),
    "llama-gqa": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "grouped queries",
        "Llama 2 70B, Llama 3, CodeLlama, TinyLlama, Yi, DeepSeek LLM, DeepSeek Coder",
        {"tie_word_embeddings": False}, is_on_gpu=True,
    ),
    "llama-mqa": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "one KV head, `head_dim` of its own", "",
        {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 77},
    ),
    "llama-3.1": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "`llama3` RoPE scaling", "Llama 3.1 and 3.3",
        {"rope_parameters": _LLAMA3},
    ),
    "llama-tied": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "tied embeddings", "Llama 3.2 1B and 3B, SmolLM, SmolLM2",
        {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-linear": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "linear RoPE scaling", "LongChat, Vicuna 16k",
        {"rope_parameters": _LINEAR},
    ),
    "llama-yarn": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "YaRN", "Yarn-Llama-2", {"rope_parameters": _YARN}
    ),
    "llama-biases": Variant(
        "Llama", "LlamaForCausalLM", "LlamaConfig", "biases on all projections", "",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "smollm3": Variant(
        "SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", "layers without positions", "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}, is_on_gpu=True,
    ),
    "granite": Variant(
        "Granite", "GraniteForCausalLM", "GraniteConfig", "multipliers on embedding, attention, residuals and logits",
        "Granite 3.0 to 3.3, dense",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.11, "residual_multiplier": 0.8, "logits_scaling": 0.5,
         "tie_word_embeddings": True},
        is_on_gpu=True,
    ),
    "mistral-window": Variant(
        "Mistral", "MistralForCausalLM", "MistralConfig", "sliding window in every layer", "Mistral 7B v0.1",
        {"sliding_window": WINDOW}, is_on_gpu=True,
    ),
    "mistral": Variant(
        "Mistral", "MistralForCausalLM", "MistralConfig", "`head_dim` of its own, no window",
        "Mistral 7B v0.2 and v0.3, Mistral Nemo, Mistral Small, Ministral 8B", {"sliding_window": None, "head_dim": 32},
    ),
    "ministral3": Variant(
        "Mistral", "Ministral3ForCausalLM", "Ministral3Config", "queries that grow with their position", "Ministral 3",
        {"head_dim": 16, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3}},
    ),
    "mistral3-text": Variant(
        "Mistral", "Mistral3ForConditionalGeneration", "MistralConfig", "text half of a multimodal checkpoint",
        "Mistral Small 3.1 and 3.2, Pixtral (transformers layout)", {"sliding_window": None, "head_dim": 16},
        wrap={"vision_config": _TINY_PIXTRAL},
    ),
    "qwen2": Variant(
        "Qwen2", "Qwen2ForCausalLM", "Qwen2Config", "biases on queries, keys and values",
        "Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen", {"tie_word_embeddings": True}, is_on_gpu=True,
    ),
    "qwen2-window": Variant(
        "Qwen2", "Qwen2ForCausalLM", "Qwen2Config", "window in the upper layers (`use_sliding_window`)", "",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2-yarn": Variant(
        "Qwen2", "Qwen2ForCausalLM", "Qwen2Config", "YaRN", "Qwen2.5 for long texts", {"rope_parameters": _YARN}
    ),
    "qwen2.5-vl-text": Variant(
        "Qwen2", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextConfig", "text half of a multimodal checkpoint",
        "Qwen2-VL, Qwen2.5-VL",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
        wrap={"vision_config": _TINY_QWEN_VISION},
    ),
    "qwen3": Variant(
        "Qwen3", "Qwen3ForCausalLM", "Qwen3Config", "norms of query and key heads", "Qwen3, dense",
        {"head_dim": 32, "tie_word_embeddings": True}, is_on_gpu=True,
    ),
    "qwen3-bias": Variant(
        "Qwen3", "Qwen3ForCausalLM", "Qwen3Config", "with biases", "", {"head_dim": 16, "attention_bias": True}
    ),
    "qwen3-vl-text": Variant(
        "Qwen3", "Qwen3VLForConditionalGeneration", "Qwen3VLTextConfig", "text half of a multimodal checkpoint",
        "Qwen3-VL, dense",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2],
                                             "mrope_interleaved": True}},
        wrap={"vision_config": {**_TINY_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "olmo2": Variant(
        "OLMo", "Olmo2ForCausalLM", "Olmo2Config", "norms behind each block, norms over all heads", "OLMo 2",
        is_on_gpu=True,
    ),
    "olmo3": Variant(
        "OLMo", "Olmo3ForCausalLM", "Olmo3Config", "windows in some layers", "OLMo 3",
        {"layer_types": _LOCAL_AND_GLOBAL, "sliding_window": WINDOW},
    ),
    "phi2": Variant(
        "Phi", "PhiForCausalLM", "PhiConfig", "parallel blocks, LayerNorm, biases, partial rotation", "Phi-1, 1.5, 2",
        {"num_key_value_heads": 6, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                                                       "rope_type": "default"}},
        is_on_gpu=True,
    ),
    "phi3": Variant(
        "Phi", "Phi3ForCausalLM", "Phi3Config", "fused projections, sliding window", "Phi-3-mini-4k, Phi-4 14B",
        {"sliding_window": WINDOW, "num_key_value_heads": 6, "tie_word_embeddings": False},
    ),
    "phi3-long": Variant(
        "Phi", "Phi3ForCausalLM", "Phi3Config", "LongRoPE beyond its first length", "Phi-3-mini-128k, Phi-3.5-mini",
        {"rope_parameters": _longrope(4), "original_max_position_embeddings": 64}, shortest=65, is_on_gpu=True,
    ),
    "phi3-short": Variant(
        "Phi", "Phi3ForCausalLM", "Phi3Config", "LongRoPE within its first length", "the same with a smaller limit",
        {"rope_parameters": _longrope(4), "original_max_position_embeddings": 64}, max_model_len=64,
    ),
    "phi4-mini": Variant(
        "Phi", "Phi3ForCausalLM", "Phi3Config", "LongRoPE on a part of each head, tied embeddings", "Phi-4-mini",
        {"rope_parameters": _longrope(6, partial_rotary_factor=0.75), "head_dim": 16, "hidden_size": 96,
         "original_max_position_embeddings": 64, "tie_word_embeddings": True},
        shortest=65,
    ),
    "gemma": Variant(
        "Gemma", "GemmaForCausalLM", "GemmaConfig", "scaled embedding, norms around 0, GELU", "Gemma 1, CodeGemma",
        {"head_dim": 16, "num_key_value_heads": 1},
    ),
    "gemma2": Variant(
        "Gemma", "Gemma2ForCausalLM", "Gemma2Config", "soft-caps, norms around each block, every other layer local",
        "Gemma 2",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 0.5},
        is_on_gpu=True,
    ),
    "gemma3": Variant(
        "Gemma", "Gemma3ForCausalLM", "Gemma3TextConfig", "local and global layers with two RoPE bases, head norms",
        "Gemma 3 270M and 1B",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "num_hidden_layers": 7,
         "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                             "sliding_attention": _LOCAL}},
        is_on_gpu=True,
    ),
    "gemma3-text": Variant(
        "Gemma", "Gemma3ForConditionalGeneration", "Gemma3TextConfig",
        "text half of a multimodal checkpoint, linear scaling of global layers", "Gemma 3 4B, 12B and 27B, MedGemma",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "layer_types": _LOCAL_AND_GLOBAL,
         "rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _LOCAL}},
        wrap={"vision_config": _TINY_SIGLIP, "mm_tokens_per_image": 4, "boi_token_index": 90, "eoi_token_index": 91,
              "image_token_index": 92},
    ),
    "mixtral": Variant(
        "Mixtral", "MixtralForCausalLM", "MixtralConfig", "two of several experts", "Mixtral 8x7B and 8x22B",
        {"num_local_experts": 4}, is_on_gpu=True,
    ),
    "granitemoe": Variant(
        "Granite", "GraniteMoeForCausalLM", "GraniteMoeConfig", "experts in one tensor, multipliers",
        "Granite 3.0 and 3.1 1B-A400M and 3B-A800M",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "embedding_multiplier": 12.0, "attention_multiplier": 0.11,
         "residual_multiplier": 0.8, "logits_scaling": 0.5, "tie_word_embeddings": True},
    ),
    "qwen2-moe": Variant(
        "Qwen-MoE", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", "shared expert behind a gate, a dense layer",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1],
         "shared_expert_intermediate_size": 40},
    ),
    "qwen3-moe": Variant(
        "Qwen-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", "normalised weights, norms of query and key heads",
        "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16,
         "norm_topk_prob": True},
        is_on_gpu=True,
    ),
    "qwen3-moe-mixed": Variant(
        "Qwen-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", "every other layer dense, weights as they are", "",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
         "decoder_sparse_step": 2, "norm_topk_prob": False},
    ),
    "qwen3-vl-moe-text": Variant(
        "Qwen-MoE", "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeTextConfig",
        "text half of a multimodal checkpoint", "Qwen3-VL-30B-A3B and -235B-A22B",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2],
                             "mrope_interleaved": True}},
        wrap={"vision_config": {**_TINY_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "olmoe": Variant(
        "OLMo", "OlmoeForCausalLM", "OlmoeConfig", "experts, norms over all heads", "OLMoE 1B-7B",
        {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 6},
    ),
    "phimoe": Variant(
        "Phi", "PhimoeForCausalLM", "PhimoeConfig", "sparsemixer router, LayerNorm, biases", "",
        {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
        is_on_gpu=True,
    ),
    "phimoe-short": Variant(
        # Beyond the first length transformers takes the short factors; the model's own code takes the long ones.
        "Phi", "PhimoeForCausalLM", "PhimoeConfig", "LongRoPE with magnitudes of its own, within its first length",
        "Phi-3.5-MoE, Phi-tiny-MoE, Phi-mini-MoE",
        {"num_local_experts": 4, "rope_parameters": _longrope(4, short_mscale=1.1, long_mscale=1.2),
         "original_max_position_embeddings": 64},
        max_model_len=64,
    ),
    "gpt-oss": Variant(
        "gpt-oss", "GptOssForCausalLM", "GptOssConfig", "sinks, windows in every other layer, biases, clamped SwiGLU",
        "gpt-oss-20b and -120b",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": WINDOW,
         "swiglu_limit": 1.0, "layer_types": _LOCAL_AND_GLOBAL,
         "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
        is_on_gpu=True,
    ),
    "deepseek-v2": Variant(
        "DeepSeek", "DeepseekV2ForCausalLM", "DeepseekV2Config", "latent attention, softmax router in groups",
        "DeepSeek-V2, DeepSeek-Coder-V2",
        {**_LATENT, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
         "q_lora_rank": 24},
    ),
    "deepseek-v2-lite": Variant(
        "DeepSeek", "DeepseekV2ForCausalLM", "DeepseekV2Config", "queries without a latent vector", "DeepSeek-V2-Lite",
        {**_LATENT, "n_shared_experts": 1, "topk_method": "greedy", "q_lora_rank": None,
         "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek-v3": Variant(
        "DeepSeek", "DeepseekV3ForCausalLM", "DeepseekV3Config", "sigmoid router with a correction, YaRN",
        "Moonlight; DeepSeek-V3 and R1 in bfloat16",
        {**_LATENT, "n_shared_experts": 1, "q_lora_rank": 24,
         "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        is_on_gpu=True,
    ),
}  # fmt: skip


def make_reference(name: str, **more: Any) -> PreTrainedModel:
    """The variant's model with random weights, norms and biases included; the same ones every time.

    Args:
        name: Key of ``VARIANTS``.
        more: Config fields over those of the variant.
    """
    variant = VARIANTS[name]
    torch.manual_seed(list(VARIANTS).index(name))
    config_class = getattr(transformers, variant.config)
    options = {**SMALL, **variant.options, **more}
    if "swiglu_limit" in options and not hasattr(config_class(), "swiglu_limit"):
        del options["swiglu_limit"]  # transformers before 5.20 has a number in its code instead
    config = config_class(**options)
    model_class = getattr(transformers, variant.architecture)
    if variant.wrap is not None:
        outer = model_class.config_class(text_config=config.to_dict(), **variant.wrap)
        outer.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        outer._attn_implementation = "eager"
        config = outer
    model = model_class(config).eval()
    is_around_zero = variant.family == "Gemma"
    # Small beside what the layers add: under tied weights a model would only repeat what it reads.
    text_config = config.get_text_config()
    embedding_scale = text_config.hidden_size**0.5 if is_around_zero else variant.options.get("embedding_multiplier", 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed_tokens" in key:
                parameter.normal_(0.0, 0.2 / embedding_scale)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 1.2 * parameter.shape[-1] ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0 if is_around_zero else 1.0, 0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    return model


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| Family | What the config says | Released models | `architectures` |", "|---|---|---|---|"]
    last = ""
    for variant in VARIANTS.values():
        family = "" if variant.family == last else f"**{variant.family}**"
        last = variant.family
        lines.append(f"| {family} | {variant.feature} | {variant.models} | `{variant.architecture}` |")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """``docs/models.md`` with the present table in its place."""
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text("utf-8")), "utf-8")
    sys.stdout.write(f"{PAGE}\n")

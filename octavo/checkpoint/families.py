"""What config.json leaves out: a family's defaults, and the language model inside a multimodal checkpoint.

transformers writes only what differs from its classes' defaults in some cases, and people's files do so in many. The
values below are those defaults, where they differ between families; ``tests/models/test_family_defaults.py`` holds them
against transformers. Knows names and numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

ARCHITECTURES: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granite4_vision_text": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "paddleocr_vl_text": "LlamaForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_omni_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_omni_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""Model type to class: for a config.json without architectures, and for the text half of one of several models."""

_QWEN_WINDOW = {"use_sliding_window": False, "max_window_layers": 28}
_QWEN2_VL = {
    "max_position_embeddings": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    **_QWEN_WINDOW, "max_window_layers": 80,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {
        "max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        "max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "max_position_embeddings": 131072, "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "counts_scaled_positions": True,  # its max_position_embeddings is the length after linear scaling
    },
    "deepseek_v2": {"max_position_embeddings": 2048},
    "deepseek_v3": {"max_position_embeddings": 4096, "n_group": 8, "topk_group": 4},
    "gpt_oss": {
        "max_position_embeddings": 131072, "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "attention_bias": True, "sliding_window": 128, "sliding_window_pattern": 2, "rope_theta": 150000.0,
        "num_local_experts": 128, "num_experts_per_tok": 4,
    },
    "granite": {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    "granite4_vision_text": {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    "granitemoe": {
        "max_position_embeddings": 2048, "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "llama": {"max_position_embeddings": 2048},
    "ministral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {
        "max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "olmo3": {
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
        "rope_theta": 5e5, "rope_local_base_freq": 5e5,
    },
    "olmoe": {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
    },
    "paddleocr_vl_text": {
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
    "phi": {
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
    },
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "phimoe": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 16, "num_experts_per_tok": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, **_QWEN_WINDOW},
    "qwen2_5_omni_text": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": True,
        **_QWEN_WINDOW,
    },
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, **_QWEN_WINDOW,
    },
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, **_QWEN_WINDOW},
    "qwen3_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "use_sliding_window": False,
    },
    "qwen3_omni_moe_text": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 1e6, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "qwen3_vl_moe_text": {
        "max_position_embeddings": 128000, "num_key_value_heads": 16, "rope_theta": 5e5, "tie_word_embeddings": True,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": True,
    },
    "qwen3_vl_text": {"max_position_embeddings": 128000, "head_dim": 128, "rope_theta": 5e5},
    "smollm3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6,
        "no_rope_layer_interval": 4, "use_sliding_window": False, "max_window_layers": 28,
    },
}  # fmt: skip
"""By model type. A field that is there but null is left so."""

_QWEN_VL = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text")
_ASKED_WINDOW = ("qwen2", "qwen2_moe", "qwen3", "smollm3", *_QWEN_VL)
_GRANITE = frozenset({"granite", "granite4_vision_text", "granitemoe"})
READERS: Mapping[str, frozenset[str]] = {
    "attention_multiplier": _GRANITE | {"deepseek_v2", "deepseek_v3"},  # of latent attention: from ``expand_mla``
    "attn_logit_softcapping": frozenset({"gemma2"}),
    "embedding_multiplier": _GRANITE,
    "final_logit_softcapping": frozenset({"gemma2", "gemma3_text"}),
    "hidden_activation": frozenset({"gemma", "gemma2", "gemma3_text"}),
    "layer_types": frozenset({"gemma2", "gemma3_text", "gpt_oss", "ministral", "olmo3", *_ASKED_WINDOW}),
    "llama_4_scaling_beta": frozenset({"ministral3"}),
    "logits_scaling": _GRANITE,
    "max_window_layers": frozenset(_ASKED_WINDOW),
    "no_rope_layer_interval": frozenset({"smollm3"}),
    "no_rope_layers": frozenset({"smollm3"}),
    "query_pre_attn_scalar": frozenset({"gemma2", "gemma3_text"}),
    "residual_multiplier": _GRANITE,
    "rope_local_base_freq": frozenset({"gemma3_text", "olmo3"}),
    "sliding_window": frozenset(
        {"gemma2", "gemma3_text", "gpt_oss", "ministral", "ministral3", "mistral", "mixtral", "olmo3", "phi3", "phimoe",
         "qwen3_moe", *_ASKED_WINDOW}
    ),
    "sliding_window_pattern": frozenset({"gemma2", "gemma3_text", "gpt_oss", "olmo3"}),
    "use_sliding_window": frozenset({"qwen3_moe", *_ASKED_WINDOW}),
}  # fmt: skip
"""Fields that some families compute with, and which: in the config.json of another family they mean nothing."""
_ROPE_OBJECTS = ("rope_parameters", "rope_scaling")

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DIMENSIONS: Mapping[str, tuple[int, int, int, int, int]] = {
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "llama": (32000, 4096, 11008, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64),
    "qwen3": (151936, 4096, 22016, 32, 32),
}
"""``_SIZES`` of families whose text halves often state none. A text-only model has to state them."""

_FLAT_WRAPPERS = {
    "paddleocr_vl": "paddleocr_vl_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text",
}  # fmt: skip
"""Multimodal configs that keep the fields of their language model beside those of the others."""
_SHARED_FIELDS = ("bos_token_id", "eos_token_id", "quantization_config", "dtype", "torch_dtype")
BOTH_WAYS = frozenset({"paligemma"})
"""Multimodal models whose language model would be another one if it were run by itself."""
_WITHIN = ("thinker_config",)
"""Fields that hold the config of a multimodal model within that of a larger one."""
_TEXT_FIELDS = ("text_config", "llm_config", "language_config")
"""transformers' word, and those of checkpoints with code of their own (InternVL, Ovis; DeepSeek-VL2)."""
_RENAMED_TYPES = {"gemma3": "gemma3_text"}


def own_fields(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """``config`` without what its family does not read.

    Configs carry along what they were converted or trained with: a window of Mistral's in a Llama, say. All fields of a
    family that is not known here are its own.
    """
    if model_type not in DEFAULTS:
        return dict(config)
    foreign = {name for name, readers in READERS.items() if model_type not in readers}
    own = {name: value for name, value in config.items() if name not in foreign}
    for name in _ROPE_OBJECTS:
        if isinstance(own.get(name), dict):
            own[name] = {key: value for key, value in own[name].items() if key not in foreign}
    return own


def language_model(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The fields of the language model in a config.json, and the architecture that wraps it (None for a text model).

    Where the wrapper's config has a ``text_config`` or the like, that is the language model's; the few fields that may
    stand outside (token ids, tying, quantisation, type) are taken from there.
    """
    names: Any = config.get("architectures")
    wrapper = str(cast("list[Any]", names)[0]) if isinstance(names, list) and names else str(config.get("model_type"))
    for name in _WITHIN:
        inside = config.get(name)
        if isinstance(inside, dict):
            config = cast("dict[str, Any]", inside)
    text = next((config[name] for name in _TEXT_FIELDS if isinstance(config.get(name), dict)), None)
    model_type = str(config.get("model_type"))
    is_flat = config.get("hidden_size") is not None and config.get("num_hidden_layers") is not None
    if text is not None and not is_flat:
        inner = dict(cast("dict[str, Any]", text))
        for name in _SHARED_FIELDS:
            if inner.get(name) is None and config.get(name) is not None:
                inner[name] = config[name]
        # What the wrapper says of tying counts for the whole model.
        if config.get("tie_word_embeddings") is not None:
            inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    elif model_type in _FLAT_WRAPPERS:
        inner = {**config, "model_type": _FLAT_WRAPPERS[model_type]}
    else:
        return dict(config), None
    inner_type = str(inner.get("model_type"))
    inner_type = inner["model_type"] = _RENAMED_TYPES.get(inner_type, inner_type)
    sizes = DIMENSIONS.get(inner_type)
    for name, value in zip(_SIZES, sizes or (), strict=False):
        inner.setdefault(name, value)
    # One that has no class of its own goes by its wrapper's name.
    inner["architectures"] = [ARCHITECTURES.get(inner_type, wrapper)]
    return inner, wrapper

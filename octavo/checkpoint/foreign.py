"""Dimensions of a family that Octavo has no model for, out of whatever words its config.json uses.

The engine needs a few numbers of every model (layers, heads, context length) before anybody looks at its code, and
this half of it does not import transformers, whose config classes know the synonyms. What is read here sizes memory;
the model itself is built from config.json as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim", "model_dim", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "n_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "d_ff", "ffn_intermediate_size"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"),
    "hidden_act": ("activation_function", "hidden_activation", "activation"),
}
"""Our word, and those of others in the order in which they are looked for."""
_FALLBACK_POSITIONS = 2048


_ENCODER = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512}
_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": _ENCODER,
    "camembert": _ENCODER,
    "modernbert": {"intermediate_size": 1152, "max_position_embeddings": 8192},
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
}
"""By model type: what the files of encoders leave out means this."""


def foreign_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the largest feed-forward size where layers have several (Gemma 3n)."""
    stated = config.get("intermediate_size")
    sizes = cast("list[Any]", stated) if isinstance(stated, list) else []
    if not sizes or not all(type(size) is int for size in sizes):
        return dict(config)
    return {**config, "intermediate_size": max(sizes)}


def foreign_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says under other names, in the form of a family's defaults.

    A feed-forward size that is nowhere stated is four times the hidden size, as in GPT-2.
    """
    found: dict[str, Any] = dict(_ENCODERS.get(str(config.get("model_type")), {}))
    for name, others in SYNONYMS.items():
        if config.get(name) is not None:
            continue
        value = next((config[other] for other in others if config.get(other) is not None), None)
        if value is not None:
            found[name] = value
    hidden = config.get("hidden_size", found.get("hidden_size"))
    if config.get("intermediate_size") is None and isinstance(hidden, int):
        found.setdefault("intermediate_size", 4 * hidden)
    if config.get("num_attention_heads") is None:
        # No attention at all, perhaps: whoever runs the model's code says so better than a missing field does.
        found.setdefault("num_attention_heads", 1)
    if isinstance(config.get("local_attention"), int):  # ModernBERT's, to both sides together
        found.setdefault("sliding_window", max(1, config["local_attention"] // 2))
    if config.get("max_position_embeddings") is None:
        found.setdefault("max_position_embeddings", _FALLBACK_POSITIONS)
    return found


def has_unknown_layers(config: Mapping[str, Any]) -> bool:
    """Whether ``layer_types`` names anything but full and windowed attention."""
    kinds: Any = config.get("layer_types")
    return isinstance(kinds, list) and any(kind not in ("full_attention", "sliding_attention") for kind in kinds)  # pyright: ignore[reportUnknownVariableType]

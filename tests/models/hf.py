"""Tiny random checkpoints, made by transformers' own classes, as the reference of the model tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from octavo.config.model import ModelConfig, RopeConfig
from octavo.layers.parameter import collect_slots
from octavo.models.interface import CausalLM

SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "gqa": (LlamaConfig, {"tie_word_embeddings": False}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}),
    "yarn-rope": (LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "one-kv-head": (LlamaConfig, {"num_key_value_heads": 1, "vocab_size": 77, "head_dim": 64}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
}


def make_reference(case: str) -> PreTrainedModel:
    """A model of the named case with random weights, biases and norms included."""
    config_class, options = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    config = config_class(**{**SMALL, **options})
    model = (Qwen3ForCausalLM if config_class is Qwen3Config else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def model_config(hf: PretrainedConfig) -> ModelConfig:
    """What the checkpoint's config says, in the engine's words."""
    rope = dict(hf.rope_parameters)
    return ModelConfig(
        architecture="Qwen3ForCausalLM" if hf.model_type == "qwen3" else "LlamaForCausalLM",
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope=RopeConfig(theta=rope.pop("rope_theta"), scaling=rope),
        tie_word_embeddings=hf.tie_word_embeddings,
        attention_bias=hf.attention_bias,
        mlp_bias=getattr(hf, "mlp_bias", False),
    )


def load_state(model: CausalLM, state: dict[str, torch.Tensor]) -> None:
    """Put a state dict into the slots of a model."""
    slots = collect_slots(model)
    rules = model.weight_map
    for name, tensor in state.items():
        if any(part in name for part in rules.ignored):
            continue
        shard = next((s for s in rules.shards if f".{s.source}." in name), None)
        target = name.replace(shard.source, shard.target) if shard else name
        slots[target].load(tensor, shard.shard if shard else None)
    assert not {name: slot.missing() for name, slot in slots.items() if slot.missing()}

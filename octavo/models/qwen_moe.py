"""Qwen2-MoE, Qwen3-MoE and OLMoE: many small experts, of which a token takes some eight.

Papers: Yang et al., "Qwen2 Technical Report", 2024, and "Qwen3 Technical Report", 2025; Muennighoff et al., "OLMoE",
2024.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DecoderForCausalLM, DecoderOptions
from octavo.models.mixture import EXPERT_WEIGHTS, make_mixture


class Qwen2MoeForCausalLM(DecoderForCausalLM):
    """A shared expert behind a gate stands beside the routed ones; biases on queries, keys and values."""

    weight_map = EXPERT_WEIGHTS

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``qkv_bias`` is true unless the config denies it."""
        return DecoderOptions(qkv_bias=bool(config.hf.get("qkv_bias", True)), make_mlp=make_mixture)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    """Norms over query and key heads instead of biases; no shared expert."""

    weight_map = EXPERT_WEIGHTS

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            has_qk_norm=True,
            make_mlp=make_mixture,
        )


class OlmoeForCausalLM(DecoderForCausalLM):
    """Norms over all query heads together, and over all key heads."""

    weight_map = EXPERT_WEIGHTS

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            has_wide_qk_norm=True,
            make_mlp=make_mixture,
        )

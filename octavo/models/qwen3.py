"""Qwen3, dense: Llama's decoder with a norm over every query and key head. Paper: Yang et al., "Qwen3", 2025."""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DecoderForCausalLM, DecoderOptions


class Qwen3ForCausalLM(DecoderForCausalLM):
    """``head_dim`` is free of ``hidden_size / num_heads``."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """QK-norm always; ``attention_bias`` covers all four projections."""
        return DecoderOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, has_qk_norm=True)

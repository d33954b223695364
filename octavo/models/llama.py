"""Llama 1 to 3.3, and the models that share their mathematics: Mistral, Ministral, Yi, SmolLM2, SmolLM3, Granite.

What distinguishes them is in their configs: windows, layers without positions, multipliers, biases. Papers: Touvron et
al., "Llama 2", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024; Jiang et al., "Mistral 7B", 2023.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DecoderForCausalLM, DecoderOptions


class LlamaForCausalLM(DecoderForCausalLM):
    """Grouped-query attention with rotary positions and a SwiGLU feed-forward."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """Biases are as the config says; ``attention_bias`` covers all four projections."""
        return DecoderOptions(
            qkv_bias=config.attention_bias, output_bias=config.attention_bias, mlp_bias=config.mlp_bias
        )

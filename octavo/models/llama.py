"""Llama 2, 3 and 3.1 to 3.3, and the models that share their mathematics: SmolLM2, TinyLlama, Mistral.

Papers: Touvron et al., "Llama 2", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024.
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

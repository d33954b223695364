"""Phi-3.5-MoE: Mixtral's layout with LayerNorms, biases and the sparsemixer router.

Papers: Abdin et al., "Phi-3 Technical Report", 2024; Liu et al., "GRIN: GRadient-INformed MoE", 2024.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.norm import LayerNorm
from octavo.models.decoder import DecoderForCausalLM, DecoderOptions
from octavo.models.mixture import SPARSE_BLOCK_WEIGHTS, make_mixture


class PhimoeForCausalLM(DecoderForCausalLM):
    """Two experts a token, chosen one after the other."""

    weight_map = SPARSE_BLOCK_WEIGHTS

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections; ``lm_head_bias`` the head.

        Raises:
            ConfigError: The head is the embedding and has a bias.
        """
        has_head_bias = bool(config.hf.get("lm_head_bias", False))
        if has_head_bias and config.hf.get("tie_word_embeddings"):
            raise ConfigError(
                "lm_head_bias and tie_word_embeddings are both true, which is not supported", param="lm_head_bias"
            )
        return DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            head_bias=has_head_bias,
            norm=LayerNorm,
            make_mlp=make_mixture,
        )

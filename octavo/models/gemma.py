"""Gemma 1, 2 and 3 (text): norms whose weights lie around 0, a scaled embedding, GELU.

Gemma 2 puts norms before and behind attention and feed-forward and bounds scores and logits; Gemma 3 drops the bounds,
normalises heads, and rotates its local layers by another base. Windows, bases, bounds and scales are in the config.
Papers: Gemma team, "Gemma", 2024; "Gemma 2", 2024; "Gemma 3 Technical Report", 2025.
"""

from __future__ import annotations

import functools

from octavo.config.model import ModelConfig
from octavo.layers.norm import RMSNorm
from octavo.models.decoder import NORMS_AROUND, NORMS_BEFORE, BlockNorms, DecoderForCausalLM, DecoderOptions


def _options(config: ModelConfig, norms: BlockNorms = NORMS_BEFORE, *, has_qk_norm: bool = False) -> DecoderOptions:
    return DecoderOptions(
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        norm=functools.partial(RMSNorm, offset=1.0, is_wide=True),
        norms=norms,
        embedding_scale=config.hidden_size**0.5,
        has_qk_norm=has_qk_norm,
    )


class GemmaForCausalLM(DecoderForCausalLM):
    """Gemma 1."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return _options(config)


class Gemma2ForCausalLM(DecoderForCausalLM):
    """Gemma 2."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return _options(config, norms=NORMS_AROUND)


class Gemma3ForCausalLM(DecoderForCausalLM):
    """The text model of Gemma 3."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return _options(config, norms=NORMS_AROUND, has_qk_norm=True)

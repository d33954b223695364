"""OLMo 2 and 3: norms behind attention and feed-forward instead of before, and over all heads together.

Paper: OLMo team, "2 OLMo 2 Furious", 2024.
"""

from __future__ import annotations

import functools

from octavo.config.model import ModelConfig
from octavo.layers.norm import RMSNorm
from octavo.models.decoder import NORMS_AFTER, DecoderForCausalLM, DecoderOptions


class Olmo2ForCausalLM(DecoderForCausalLM):
    """OLMo 3 adds windows to three of four layers, which the config says."""

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            norm=functools.partial(RMSNorm, is_wide=True),
            norms=NORMS_AFTER,
            has_wide_qk_norm=True,
        )

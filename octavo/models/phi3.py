"""Phi-3, 3.5 and 4: Llama's decoder whose checkpoints store queries, keys and values in one tensor, gate and up in one.

Rotation of a part of each head and long contexts (LongRoPE) are in the config. Paper: Abdin et al., "Phi-3 Technical
Report", 2024.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DECODER_WEIGHTS, DecoderForCausalLM, DecoderOptions
from octavo.models.interface import WeightMap


class Phi3ForCausalLM(DecoderForCausalLM):
    """No biases, no shards."""

    weight_map = WeightMap(ignored=DECODER_WEIGHTS.ignored)

    def options(self, config: ModelConfig) -> DecoderOptions:  # noqa: ARG002
        """As Llama without biases."""
        return DecoderOptions()

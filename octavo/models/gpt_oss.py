"""gpt-oss: biases everywhere, a learned sink in every head's softmax, windows in every other layer, clamped SwiGLU.

Papers: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025; Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", ICLR 2024.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DECODER_WEIGHTS, DecoderForCausalLM, DecoderOptions
from octavo.models.interface import Stack, WeightMap
from octavo.models.mixture import make_mixture


class GptOssForCausalLM(DecoderForCausalLM):
    """Windows, sinks and the biases of router and experts are in the config."""

    weight_map = WeightMap(
        shards=DECODER_WEIGHTS.shards,
        ignored=DECODER_WEIGHTS.ignored,
        renames=(("router", "gate"),),
        stacks=(
            Stack(
                "experts.gate_up_proj",
                ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
                is_transposed=True,
                is_interleaved=True,
            ),
            Stack(
                "experts.gate_up_proj_bias",
                ("experts.{}.gate_proj.bias", "experts.{}.up_proj.bias"),
                is_interleaved=True,
            ),
            Stack("experts.down_proj", ("experts.{}.down_proj.weight",), is_transposed=True),
            Stack("experts.down_proj_bias", ("experts.{}.down_proj.bias",)),
        ),
    )

    def options(self, config: ModelConfig) -> DecoderOptions:
        """``attention_bias`` covers all four projections."""
        return DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            make_mlp=make_mixture,
        )

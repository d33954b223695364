"""Mixtral and GraniteMoE: Llama's decoder with the same number of experts in every layer.

Papers: Jiang et al., "Mixtral of Experts", 2024; IBM, "Granite 3.0 Language Models", 2024 (its multipliers are in the
config).
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DECODER_WEIGHTS, DecoderForCausalLM, DecoderOptions
from octavo.models.interface import Stack, WeightMap
from octavo.models.mixture import SPARSE_BLOCK_WEIGHTS, make_mixture


class MixtralForCausalLM(DecoderForCausalLM):
    """Two of eight experts, as Mixtral was trained; the weights of a token's experts sum to one."""

    weight_map = SPARSE_BLOCK_WEIGHTS

    def options(self, config: ModelConfig) -> DecoderOptions:
        """Biases as the config says; Mixtral has none."""
        return DecoderOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, make_mlp=make_mixture)


class GraniteMoeForCausalLM(MixtralForCausalLM):
    """The same mathematics; all experts of a layer in one tensor."""

    weight_map = WeightMap(
        shards=DECODER_WEIGHTS.shards,
        ignored=DECODER_WEIGHTS.ignored,
        renames=(("block_sparse_moe", "mlp"), ("router", "gate"), ("layer", "")),
        stacks=(
            Stack("input_linear.weight", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")),
            Stack("output_linear.weight", ("experts.{}.down_proj.weight",)),
        ),
    )

"""What families with mixtures of experts share: the feed-forward of a layer, and the names of stacked experts."""

from __future__ import annotations

from dataclasses import replace

from octavo.config.model import ModelConfig
from octavo.layers.context import LayerContext
from octavo.layers.moe import MixtureOfExperts
from octavo.models.decoder import DECODER_WEIGHTS, DecoderOptions, FeedForward, GatedMLP
from octavo.models.interface import Stack, WeightMap

EXPERT_STACKS = (
    Stack("experts.gate_up_proj", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")),
    Stack("experts.down_proj", ("experts.{}.down_proj.weight",)),
)
"""As newer libraries hold experts in memory, and some checkpoints are stored."""

EXPERT_WEIGHTS = WeightMap(shards=DECODER_WEIGHTS.shards, ignored=DECODER_WEIGHTS.ignored, stacks=EXPERT_STACKS)
"""Names of most families: ``mlp.gate``, ``mlp.experts.7.gate_proj``, ``mlp.shared_expert``."""

SPARSE_BLOCK_WEIGHTS = WeightMap(
    shards=DECODER_WEIGHTS.shards,
    ignored=DECODER_WEIGHTS.ignored,
    renames=(("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")),
    stacks=EXPERT_STACKS,
)
"""Mixtral's: ``block_sparse_moe.experts.7.w1``."""


def make_mixture(config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int) -> FeedForward:
    """The feed-forward of layer ``index``: a mixture of experts where the config has one there, else a dense one."""
    moe = config.moe
    if moe is None or not moe.layers[index]:
        return GatedMLP(config, options, context, index)
    shared = None
    if moe.shared_size:
        shared = GatedMLP(replace(config, intermediate_size=moe.shared_size), options, context, index)
    return MixtureOfExperts(context, moe, config.hidden_size, config.hidden_act, shared)

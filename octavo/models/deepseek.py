"""DeepSeek-V2 and V3 (and R1): multi-head latent attention, routed and shared experts.

Keys and values are expanded from their latent vectors to full heads before they are cached, so that every attention
backend serves. That stores ``2 * H * (plain + rotary)`` values a token and layer, where the latent form would store
``kv_rank + rotary``: a cache of latents, with the expansion folded into queries and outputs, is not built.
Papers: DeepSeek-AI, "DeepSeek-V2", 2024, and "DeepSeek-V3 Technical Report", 2024.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.parameter import Layer
from octavo.layers.rotary import Rotary, Rotations
from octavo.layers.stream import Normed
from octavo.models.decoder import DECODER_WEIGHTS, DecoderForCausalLM, DecoderOptions
from octavo.models.interface import WeightMap
from octavo.models.mixture import EXPERT_STACKS, make_mixture

_LATENT_EPS = 1e-6
"""Of the norms of latent vectors: theirs is fixed, whatever the config says of the others."""


class LatentAttention(Layer):
    """Queries, keys and values from latent vectors; heads lie as ``[rotary | plain]``: the first part rotates."""

    def __init__(
        self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int, rotary: Rotary
    ) -> None:
        del options
        mla = config.mla
        if mla is None:
            raise ConfigError("the model has latent attention, but its config has no kv_lora_rank", param="model")
        self._mla, self._heads = mla, config.num_heads
        heads, size = config.num_heads, mla.plain_dim + mla.rotary_dim
        order = _head_order(mla.plain_dim, mla.rotary_dim, mla.is_interleaved)
        all_heads = (torch.arange(heads)[:, None] * size + order).flatten()
        bias = config.attention_bias
        if mla.query_rank is None:
            self.q_proj = Linear(context, config.hidden_size, heads * size, row_order=all_heads)
        else:
            self.q_a_proj = Linear(context, config.hidden_size, mla.query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(context, mla.query_rank, _LATENT_EPS)
            self.q_b_proj = Linear(context, mla.query_rank, heads * size, row_order=all_heads)
        latent = torch.arange(mla.kv_rank)
        position = mla.kv_rank - mla.plain_dim + order[: mla.rotary_dim]
        self.kv_a_proj_with_mqa = Linear(
            context,
            config.hidden_size,
            mla.kv_rank + mla.rotary_dim,
            bias=bias,
            row_order=torch.cat((latent, position)),
        )
        self.kv_a_layernorm = RMSNorm(context, mla.kv_rank, _LATENT_EPS)
        self.kv_b_proj = Linear(context, mla.kv_rank, heads * (mla.plain_dim + mla.value_dim))
        self.o_proj = Linear(context, heads * mla.value_dim, config.hidden_size, bias=bias)
        self.attention = Attention(
            context, heads, heads, size, scale=config.attention_scale, sliding_window=config.windows[index]
        )
        assert rotary.rotary_dim == mla.rotary_dim, "the config says how much of a head rotates"

    def forward(self, x: Normed, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """``[T, E] -> [T, E]``."""
        mla, heads, tokens = self._mla, self._heads, len(batch.positions)
        if mla.query_rank is None:
            q = self.q_proj.forward(x)
        else:
            q = self.q_b_proj.forward(self.q_a_layernorm.forward(self.q_a_proj.forward(x)))
        compressed = self.kv_a_proj_with_mqa.forward(x)
        latent, position = compressed.split((mla.kv_rank, mla.rotary_dim), dim=1)
        expanded = self.kv_b_proj.forward(self.kv_a_layernorm.forward(latent.contiguous()))
        plain, value = expanded.view(tokens, heads, -1).split((mla.plain_dim, mla.value_dim), dim=2)
        qkv = q.new_zeros(tokens, 3, heads, mla.plain_dim + mla.rotary_dim)
        qkv[:, 0] = q.view(tokens, heads, -1)
        qkv[:, 1, :, : mla.rotary_dim] = position[:, None]
        qkv[:, 1, :, mla.rotary_dim :] = plain
        qkv[:, 2, :, : mla.value_dim] = value
        out = self.attention.forward(qkv.view(tokens, -1), rotations, batch)
        return self.o_proj.forward(out.view(tokens, heads, -1)[..., : mla.value_dim].flatten(1))


def _head_order(plain: int, rotary: int, is_interleaved: bool) -> Tensor:
    """``[plain + rotary]``: where each stored row of a query head is in the checkpoint's ``[plain | rotary]``."""
    pairs = torch.arange(rotary)
    if not is_interleaved:
        pairs = pairs.view(2, -1).t().flatten()
    return torch.cat((plain + pairs, torch.arange(plain)))


class DeepseekForCausalLM(DecoderForCausalLM):
    """V2 and V3 differ in their routers, which the config describes."""

    weight_map = WeightMap(
        shards=DECODER_WEIGHTS.shards,
        ignored=DECODER_WEIGHTS.ignored,
        renames=(("shared_experts", "shared_expert"),),
        stacks=EXPERT_STACKS,
    )

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        # Layers after the last one predict further tokens, for speculation; they are skipped knowingly.
        extra = int(config.hf.get("num_nextn_predict_layers") or 0)
        names = tuple(f"model.layers.{config.num_layers + index}." for index in range(extra))
        self.weight_map = replace(self.weight_map, ignored=(*self.weight_map.ignored, *names))

    def options(self, config: ModelConfig) -> DecoderOptions:
        """Latent attention; experts as the config says."""
        return DecoderOptions(mlp_bias=config.mlp_bias, make_mlp=make_mixture, make_attention=LatentAttention)

"""The decoder that most models are: embedding, blocks of attention and feed-forward, final norm, head.

A family says with ``DecoderOptions`` how its blocks are wired (norms and where they stand, biases, activations, another
feed-forward or attention) and states its checkpoint names; sizes, windows, positions and scales are in ``ModelConfig``.
See ``llama.py`` for the smallest. Paper: Touvron et al., "LLaMA", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig, RopeConfig
from octavo.errors import ConfigError
from octavo.layers.activation import activation, gated_activation
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm, RMSNorm
from octavo.layers.parameter import Layer, Parameter
from octavo.layers.rotary import Rotary, Rotations, head_order
from octavo.layers.stream import Normed, Product, ResidualStream, as_tensor
from octavo.models.interface import Shard, WeightMap

DECODER_WEIGHTS = WeightMap(
    shards=(
        Shard("q_proj", "qkv_proj", "q"),
        Shard("k_proj", "qkv_proj", "k"),
        Shard("v_proj", "qkv_proj", "v"),
        Shard("gate_proj", "gate_up_proj", "gate"),
        Shard("up_proj", "gate_up_proj", "up"),
    ),
    ignored=("rotary_emb.inv_freq",),
)
"""Names that Llama's descendants share."""


class Mixer(Protocol):
    """What stands for attention in a block."""

    def forward(self, x: Normed, rotations: Rotations, batch: ForwardBatch) -> Tensor | Product:
        """``[T, E] -> [T, E]``, a tensor of its own."""
        ...


class FeedForward(Protocol):
    """What stands for the feed-forward in a block."""

    def forward(self, x: Normed) -> Tensor | Product:
        """``[T, E] -> [T, E]``, a tensor of its own."""
        ...


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """Where norms stand in a block, by their names in the checkpoint; None for none there."""

    attention_input: str | None = "input_layernorm"
    attention_output: str | None = None
    mlp_input: str | None = "post_attention_layernorm"
    mlp_output: str | None = None


NORMS_BEFORE = BlockNorms()
NORMS_AFTER = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
NORMS_AROUND = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """What distinguishes families."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm: Callable[[LayerContext, int, float], RMSNorm | LayerNorm] = RMSNorm
    """Makes a norm of the residual stream: context, size, epsilon."""
    norms: BlockNorms = NORMS_BEFORE
    embedding_scale: float = 1.0
    """Multiplies what comes out of the embedding, beside the config's own factor."""
    is_parallel: bool = False
    """Attention and feed-forward read the same norm, ``attention_input``, and are added together."""
    has_qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation."""
    has_wide_qk_norm: bool = False
    """RMSNorm over all query heads together, and over all key heads, before the rotation."""
    make_mlp: Callable[[ModelConfig, DecoderOptions, LayerContext, int], FeedForward] | None = None
    """Feed-forward of a layer, by its index; None: ``GatedMLP`` everywhere."""
    mlp_name: str = "mlp"
    """What checkpoints call it."""
    make_attention: Callable[[ModelConfig, DecoderOptions, LayerContext, int, Rotary], Mixer] | None = None
    """Attention of a layer; None: ``SelfAttention`` everywhere."""


class SelfAttention(Layer):
    """Project, attend over normalised (if asked) and rotated heads, project."""

    def __init__(
        self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int, rotary: Rotary
    ) -> None:
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        order = rotary.head_order
        self.qkv_proj = Linear(
            context,
            config.hidden_size,
            {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size},
            bias=options.qkv_bias,
            row_order=head_order(order, rotated=heads + kv_heads, plain=kv_heads),
        )
        self.o_proj = Linear(context, heads * size, config.hidden_size, bias=options.output_bias)
        if options.has_qk_norm:
            self.q_norm = _head_norm(options, context, size, config.rms_norm_eps, order)
            self.k_norm = _head_norm(options, context, size, config.rms_norm_eps, order)
        elif options.has_wide_qk_norm:
            all_heads = (head_order(order, rotated=count, plain=0) for count in (heads, kv_heads))
            self.q_norm = _head_norm(options, context, heads * size, config.rms_norm_eps, next(all_heads))
            self.k_norm = _head_norm(options, context, kv_heads * size, config.rms_norm_eps, next(all_heads))
        self._head_norms = (self.q_norm, self.k_norm) if options.has_qk_norm else None
        self._wide_norms = (self.q_norm, self.k_norm) if options.has_wide_qk_norm else None
        self._sizes = (heads * size, kv_heads * size)
        self.attention = Attention(
            context,
            heads,
            kv_heads,
            size,
            scale=config.attention_scale,
            sliding_window=config.windows[index],
            logit_softcap=config.attention_softcap,
            has_sinks=config.has_sinks,
        )
        if config.has_sinks:
            self.sinks = Parameter(
                (heads,),
                lambda: torch.empty(heads, dtype=torch.float32, device=context.device),
                self.attention.set_sinks,
            )

    def forward(self, x: Normed, rotations: Rotations, batch: ForwardBatch) -> Product:
        """``[T, E] -> [T, E]``."""
        qkv = self.qkv_proj.forward(x)
        if self._wide_norms is not None:
            q_size, k_size = self._sizes
            q, k = qkv[:, :q_size], qkv[:, q_size : q_size + k_size]
            q.copy_(self._wide_norms[0].forward(q))
            k.copy_(self._wide_norms[1].forward(k))
        scales = rotations.query_scales()
        if scales is not None:
            assert self._head_norms is None, "a norm of heads would undo it"
            qkv[:, : self._sizes[0]].mul_(scales.to(qkv.dtype))
        return self.o_proj.later(self.attention.forward(qkv, rotations, batch, self._head_norms))


def _head_norm(options: DecoderOptions, context: LayerContext, size: int, eps: float, order: Tensor) -> RMSNorm:
    norm = options.norm(context, size, eps)
    assert isinstance(norm, RMSNorm), "norms of heads are RMSNorms"
    norm.permute(order)
    return norm


class GatedMLP(Layer):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int = 0) -> None:
        del index  # the same in every layer
        size = config.intermediate_size
        self.gate_up_proj = Linear(context, config.hidden_size, {"gate": size, "up": size}, bias=options.mlp_bias)
        self.down_proj = Linear(context, size, config.hidden_size, bias=options.mlp_bias)
        self._activation = gated_activation(config.hidden_act)

    def forward(self, x: Tensor | Normed) -> Product:
        """``[T, E] -> [T, E]``."""
        return self.down_proj.later(self.gate_up_proj.forward_gated(x, self._activation))


class PlainMLP(Layer):
    """``down(act(up(x)))``."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int = 0) -> None:
        del index  # the same in every layer
        size = config.intermediate_size
        self.up_proj = Linear(context, config.hidden_size, size, bias=options.mlp_bias)
        self.down_proj = Linear(context, size, config.hidden_size, bias=options.mlp_bias)
        self._activation = activation(config.hidden_act)

    def forward(self, x: Tensor | Normed) -> Product:
        """``[T, E] -> [T, E]``."""
        return self.down_proj.later(self._activation(self.up_proj.forward(x)))


class DecoderLayer(Layer):
    """Attention and feed-forward, with norms before, after or around them, added to the residual stream."""

    def __init__(
        self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int, rotary: Rotary
    ) -> None:
        make_attention = options.make_attention or SelfAttention
        make_mlp = options.make_mlp or GatedMLP
        self._attention_input = self._norm(config, options, context, options.norms.attention_input)
        self.self_attn = make_attention(config, options, context, index, rotary)
        self._attention_output = self._norm(config, options, context, options.norms.attention_output)
        self._mlp_input = self._norm(config, options, context, options.norms.mlp_input)
        self._mlp = make_mlp(config, options, context, index)
        setattr(self, options.mlp_name, self._mlp)  # the checkpoint's name
        self._mlp_output = self._norm(config, options, context, options.norms.mlp_output)
        self._scale = config.residual_scale
        self._is_parallel = options.is_parallel

    def _norm(
        self, config: ModelConfig, options: DecoderOptions, context: LayerContext, name: str | None
    ) -> RMSNorm | LayerNorm | None:
        if name is None:
            return None
        norm = options.norm(context, config.hidden_size, config.rms_norm_eps)
        setattr(self, name, norm)  # the checkpoint's name
        return norm

    def forward(self, stream: ResidualStream, rotations: Rotations, batch: ForwardBatch) -> None:
        """One layer on the ``stream``, with the ``rotations`` of the step and the step."""
        x = stream.normed(self._attention_input)
        mixed = self.self_attn.forward(x, rotations, batch)
        if self._is_parallel:
            both = as_tensor(mixed).add_(as_tensor(self._mlp.forward(x)))
            stream.add(self._scaled(both))
            return
        if self._attention_output is not None:
            mixed = self._attention_output.forward(as_tensor(mixed))
        stream.add(self._scaled(mixed))
        fed = self._mlp.forward(stream.normed(self._mlp_input))
        if self._mlp_output is not None:
            fed = self._mlp_output.forward(as_tensor(fed))
        stream.add(self._scaled(fed))

    def _scaled(self, delta: Tensor | Product) -> Tensor | Product:
        return delta if self._scale == 1.0 else as_tensor(delta).mul_(self._scale)


class Decoder(Layer):
    """``[T]`` token ids to ``[T, E]`` hidden states after the final norm."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, context: LayerContext) -> None:
        self.embed_tokens = Embedding(
            context, config.vocab_size, config.hidden_size, is_tied=config.tie_word_embeddings
        )
        # In the dtype of the model, as the checkpoints were trained.
        self._embedding_scale = torch.tensor(
            config.embedding_scale * options.embedding_scale, dtype=context.dtype
        ).item()
        kinds: list[RopeConfig | None] = []
        for rope in config.ropes:
            if rope not in kinds:
                kinds.append(rope)
        self._rotaries = [
            Rotary(
                rope,
                config.head_dim,
                context.max_model_len or config.max_position_embeddings,
                config.max_position_embeddings,
                context.device,
            )
            for rope in kinds
        ]
        self._rotary_of_layer = [kinds.index(rope) for rope in config.ropes]
        self.layers = [
            DecoderLayer(config, options, context, index, self._rotaries[kind])
            for index, kind in enumerate(self._rotary_of_layer)
        ]
        self.norm = options.norm(context, config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: ForwardBatch, hidden: Tensor | None) -> Tensor:
        """Run all layers; ``hidden`` may be overwritten when it is given."""
        stream = ResidualStream(self._embed(batch) if hidden is None else hidden)
        rotations = [rotary.forward(batch.positions) for rotary in self._rotaries]
        for layer, kind in zip(self.layers, self._rotary_of_layer, strict=True):
            layer.forward(stream, rotations[kind], batch)
        return stream.normed(self.norm).tensor()

    def _embed(self, batch: ForwardBatch) -> Tensor:
        embedded = self.embed_tokens.forward(batch.input_ids)
        return embedded if self._embedding_scale == 1.0 else embedded.mul_(self._embedding_scale)


class DecoderForCausalLM(Layer):
    """A decoder with its output head; families derive from this and give ``options``."""

    weight_map = DECODER_WEIGHTS

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        """Build the model with empty weights.

        Raises:
            ConfigError: A part of the config is not supported; names it.
        """
        if config.head_dim % 2:
            raise ConfigError(f"head_dim {config.head_dim} is odd, but rotary heads come in pairs", param="head_dim")
        options = self.options(config)
        self.model = Decoder(config, options, context)
        self._is_tied = config.tie_word_embeddings
        self._logit_scale, self._logit_softcap = config.logit_scale, config.logit_softcap
        if self._is_tied:
            # A checkpoint may carry the head although it is the embedding; it is skipped knowingly.
            shared = type(self).weight_map
            self.weight_map = replace(shared, ignored=(*shared.ignored, "lm_head."))
        else:
            self.lm_head = Linear(context, config.hidden_size, config.vocab_size, bias=options.head_bias)

    def options(self, config: ModelConfig) -> DecoderOptions:
        """What this family asks of the decoder."""
        raise NotImplementedError

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see CausalLM."""
        return self.model.forward(batch, hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[L, E] -> [L, V]``; see CausalLM."""
        logits = self.model.embed_tokens.logits(hidden) if self._is_tied else self.lm_head.forward(hidden)
        if self._logit_scale != 1.0:
            logits.mul_(self._logit_scale)
        if self._logit_softcap is not None:
            logits.div_(self._logit_softcap).tanh_().mul_(self._logit_softcap)
        return logits

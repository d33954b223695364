"""The pre-norm decoder that most models are: embedding, blocks of attention and gated feed-forward, final norm, head.

A family differs in what it passes here (biases, head norms, activations) and states its checkpoint names; see
``llama.py`` for the smallest. Paper: Touvron et al., "LLaMA", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.activation import gated_activation
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.parameter import Layer
from octavo.layers.rotary import Rotary, Rotations, head_order
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


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """What distinguishes families."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation."""


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
            self.q_norm = RMSNorm(context, size, config.rms_norm_eps, order=order)
            self.k_norm = RMSNorm(context, size, config.rms_norm_eps, order=order)
        # After its members, whose names in the tree are those of checkpoints.
        self._norms = (self.q_norm, self.k_norm) if options.has_qk_norm else None
        self.attention = Attention(context, heads, kv_heads, size, sliding_window=config.windows[index])

    def forward(self, x: Tensor, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """``[T, E] -> [T, E]``."""
        qkv = self.qkv_proj.forward(x)
        return self.o_proj.forward(self.attention.forward(qkv, rotations, batch, self._norms))


class GatedMLP(Layer):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, context: LayerContext) -> None:
        size = config.intermediate_size
        self.gate_up_proj = Linear(context, config.hidden_size, {"gate": size, "up": size}, bias=options.mlp_bias)
        self.down_proj = Linear(context, size, config.hidden_size, bias=options.mlp_bias)
        self._activation = gated_activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, E] -> [T, E]``."""
        return self.down_proj.forward(self._activation(self.gate_up_proj.forward(x)))


class DecoderLayer(Layer):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, options: DecoderOptions, context: LayerContext, index: int, rotary: Rotary
    ) -> None:
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, options, context, index, rotary)
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, options, context)

    def forward(self, residual: Tensor, delta: Tensor | None, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """One layer on the stream ``residual + delta``, both ``[T, E]``; what is not added yet is handed on, so that
        each addition is one pass with the norm behind it.

        Args:
            residual: Written.
            delta: What the layer before contributes; None for nothing.
            rotations: Of the step.
            batch: The step.

        Returns:
            What this layer's feed-forward contributes, not added to ``residual`` yet.
        """
        x = self.input_layernorm.add_forward(residual, delta)
        x = self.post_attention_layernorm.add_forward(residual, self.self_attn.forward(x, rotations, batch))
        return self.mlp.forward(x)


class Decoder(Layer):
    """``[T]`` token ids to ``[T, E]`` hidden states after the final norm."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, context: LayerContext) -> None:
        self.embed_tokens = Embedding(
            context, config.vocab_size, config.hidden_size, is_tied=config.tie_word_embeddings
        )
        self._rotary = Rotary(
            config.rope,
            config.head_dim,
            context.max_model_len or config.max_position_embeddings,
            config.max_position_embeddings,
            context.device,
        )
        self.layers = [
            DecoderLayer(config, options, context, index, self._rotary) for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: ForwardBatch, hidden: Tensor | None) -> Tensor:
        """Run all layers; ``hidden`` is written when it is given."""
        residual = self.embed_tokens.forward(batch.input_ids) if hidden is None else hidden
        rotations = self._rotary.forward(batch.positions)
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer.forward(residual, delta, rotations, batch)
        return self.norm.add_forward(residual, delta)


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
        self.model = Decoder(config, self.options(config), context)
        self._is_tied = config.tie_word_embeddings
        if self._is_tied:
            # A checkpoint may carry the head although it is the embedding; it is skipped knowingly.
            shared = type(self).weight_map
            self.weight_map = WeightMap(shared.prefixes, shared.shards, (*shared.ignored, "lm_head."))
        else:
            self.lm_head = Linear(context, config.hidden_size, config.vocab_size)

    def options(self, config: ModelConfig) -> DecoderOptions:
        """What this family asks of the decoder."""
        raise NotImplementedError

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see CausalLM."""
        return self.model.forward(batch, hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[L, E] -> [L, V]``; see CausalLM."""
        return self.model.embed_tokens.logits(hidden) if self._is_tied else self.lm_head.forward(hidden)

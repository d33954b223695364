"""ModernBERT: an encoder with rotary positions, gated feed-forwards, and windows in most of its layers.

Pre-norm without biases; every n-th layer sees the whole text, the others a window around each token, with a RoPE base
of their own. Paper: Warner et al., "Smarter, Better, Faster, Longer", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import PoolingConfig
from octavo.errors import ConfigError
from octavo.layers.activation import activation, gated_activation
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm
from octavo.layers.parameter import Layer
from octavo.layers.rotary import Rotary, Rotations, head_order
from octavo.models.interface import WeightMap

_THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
_UNSUPPORTED = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


class ScaleNorm(LayerNorm):
    """LayerNorm with a weight and no bias."""

    def __init__(self, context: LayerContext, size: int, eps: float) -> None:
        super().__init__(context, size, eps)
        del self.bias
        self._shift = torch.zeros(size, dtype=context.dtype, device=context.device)


class EncoderAttention(Layer):
    """Rotated heads over the whole text or a window."""

    def __init__(self, context: LayerContext, config: ModelConfig, rotary: Rotary, window: int | None) -> None:
        heads, size = config.num_heads, config.head_dim
        order = head_order(rotary.head_order, rotated=2 * heads, plain=heads)
        self.Wqkv = Linear(context, config.hidden_size, 3 * heads * size, row_order=order)
        self.Wo = Linear(context, heads * size, config.hidden_size)
        self._attention = Attention(context, heads, heads, size, sliding_window=window)

    def forward(self, x: Tensor, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """``[T, E] -> [T, E]``."""
        return self.Wo.forward(self._attention.forward(self.Wqkv.forward(x), rotations, batch))


class GatedFeedForward(Layer):
    """``Wo(act(a) * b)`` for the halves of ``Wi(x)``."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.Wi = Linear(context, config.hidden_size, 2 * config.intermediate_size)
        self.Wo = Linear(context, config.intermediate_size, config.hidden_size)
        self._activation = gated_activation(str(config.hf.get("hidden_activation", "gelu")))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, E] -> [T, E]``."""
        return self.Wo.forward(self._activation(self.Wi.forward(x)))


class EncoderLayer(Layer):
    """Attention and feed-forward, each behind a norm; but the first layer's input is normalised already."""

    def __init__(
        self, context: LayerContext, config: ModelConfig, index: int, rotary: Rotary, window: int | None
    ) -> None:
        eps = _norm_eps(config)
        if index:
            self.attn_norm = ScaleNorm(context, config.hidden_size, eps)
        self._is_first = index == 0
        self.attn = EncoderAttention(context, config, rotary, window)
        self.mlp_norm = ScaleNorm(context, config.hidden_size, eps)
        self.mlp = GatedFeedForward(context, config)

    def forward(self, residual: Tensor, delta: Tensor | None, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """As a decoder's layer: ``residual + delta`` come in, the next delta goes out, ``residual`` is written."""
        x = residual if self._is_first else self.attn_norm.add_forward(residual, delta)
        x = self.mlp_norm.add_forward(residual, self.attn.forward(x, rotations, batch))
        return self.mlp.forward(x)


class Embeddings(Layer):
    """Tokens only: positions are rotations."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.tok_embeddings = Embedding(context, config.vocab_size, config.hidden_size)
        self.norm = ScaleNorm(context, config.hidden_size, _norm_eps(config))


class ClassifierHead(Layer):
    """What stands before the classifier."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.dense = Linear(context, config.hidden_size, config.hidden_size)
        self.norm = ScaleNorm(context, config.hidden_size, _norm_eps(config))
        self._activation = activation(str(config.hf.get("classifier_activation", "gelu")))

    def forward(self, x: Tensor) -> Tensor:
        """``[L, E] -> [L, E]``."""
        return self.norm.forward(self._activation(self.dense.forward(x)))


class ModernBertPoolingModel(Layer):
    """See PoolingModel."""

    def __init__(self, config: ModelConfig, pooling: PoolingConfig, context: LayerContext) -> None:
        """Build the model with empty weights.

        Raises:
            ConfigError: A part of the config is not supported; names it.
        """
        for name in _UNSUPPORTED:
            if config.hf.get(name):
                raise ConfigError(f"model config: {name} is set, which is not supported", param="model")
        kinds = _layer_kinds(config)
        positions = context.max_model_len or config.max_position_embeddings
        self._rotaries = {
            kind: Rotary(
                _rope(config, kind), config.head_dim, positions, config.max_position_embeddings, context.device
            )
            for kind in dict.fromkeys(kinds)
        }
        self._kinds = kinds
        window = _integer(config, "local_attention", 128) // 2
        self.embeddings = Embeddings(context, config)
        self.layers = [
            EncoderLayer(context, config, index, self._rotaries[kind], window if kind == "sliding_attention" else None)
            for index, kind in enumerate(kinds)
        ]
        self.final_norm = ScaleNorm(context, config.hidden_size, _norm_eps(config))
        is_classifier = pooling.task == "classify"
        if is_classifier:
            self.head = ClassifierHead(context, config)
            self.classifier = Linear(context, config.hidden_size, pooling.num_labels, bias=True)
        is_bare = config.architecture.endswith("Model")
        own = (("head.", "head."), ("classifier.", "classifier."))
        self.weight_map = WeightMap(
            prefixes=() if is_bare else (*own, ("model.", "")),
            ignored=() if is_classifier else ("head.", "classifier.", "decoder."),
        )

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see PoolingModel."""
        x = hidden
        if x is None:
            x = self.embeddings.norm.forward(self.embeddings.tok_embeddings.forward(batch.input_ids))
        rotations = {kind: rotary.forward(batch.positions) for kind, rotary in self._rotaries.items()}
        delta: Tensor | None = None
        for kind, layer in zip(self._kinds, self.layers, strict=True):
            delta = layer.forward(x, delta, rotations[kind], batch)
        return self.final_norm.add_forward(x, delta)

    def project(self, pooled: Tensor) -> Tensor:
        """``[L, E] -> [L, N]``; see PoolingModel."""
        return self.classifier.forward(self.head.forward(pooled))


def _layer_kinds(config: ModelConfig) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer."""
    stated = config.hf.get("layer_types")
    if isinstance(stated, list) and len(stated) == config.num_layers and set(stated) <= set(_THETAS):
        return [str(kind) for kind in stated]
    if stated is not None:
        raise ConfigError(
            f"model config: layer_types must be {config.num_layers} of {', '.join(_THETAS)}", param="model"
        )
    every = _integer(config, "global_attn_every_n_layers", 3)
    return ["sliding_attention" if index % every else "full_attention" for index in range(config.num_layers)]


def _rope(config: ModelConfig, kind: str) -> RopeConfig:
    """The base of a kind of layer, in either of the forms in which configs have it."""
    name, default = _THETAS[kind]
    nested: Any = config.hf.get("rope_parameters")
    table = nested.get(kind) if isinstance(nested, Mapping) else None
    if isinstance(table, Mapping) and table.get("rope_type", "default") != "default":
        raise ConfigError(f"model config: rope_parameters of {kind} has a type other than default", param="model")
    theta = table.get("rope_theta") if isinstance(table, Mapping) else config.hf.get(name)
    theta = default if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e12:
        raise ConfigError(f"model config: the RoPE base of {kind} is {theta!r:.60}", param="model")
    return RopeConfig(theta=float(theta))


def _norm_eps(config: ModelConfig) -> float:
    eps = config.hf.get("norm_eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ConfigError(f"model config: norm_eps is {eps!r:.60}, but must be a number in [0, 1)", param="model")
    return float(eps)


def _integer(config: ModelConfig, name: str, default: int) -> int:
    value = config.hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConfigError(f"model config: {name} is {value!r:.60}, but must be an integer from 1", param="model")
    return value

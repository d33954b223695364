"""BERT and RoBERTa encoders, for embeddings and as classifiers; XLM-RoBERTa and CamemBERT are RoBERTa's mathematics.

Post-norm: each norm follows its addition. Papers: Devlin et al., "BERT", NAACL 2019; Liu et al., "RoBERTa", 2019;
Reimers and Gurevych, "Sentence-BERT", EMNLP 2019.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig
from octavo.config.sections import PoolingConfig
from octavo.errors import ConfigError
from octavo.layers.activation import activation
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm
from octavo.layers.parameter import Layer
from octavo.models.interface import Shard, WeightMap

_SHARDS = (
    Shard("query", "qkv_proj", "q"),
    Shard("key", "qkv_proj", "k"),
    Shard("value", "qkv_proj", "v"),
)
_IGNORED = ("position_ids", "cls.predictions", "cls.seq_relationship", "lm_head.")
_UNSUPPORTED: Mapping[str, object] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
"""Fields of config.json that must have this value, if they are there."""


class AddNorm(Layer):
    """``norm(x + dense(y))``."""

    def __init__(self, context: LayerContext, in_features: int, config: ModelConfig) -> None:
        self.dense = Linear(context, in_features, config.hidden_size, bias=True)
        self.LayerNorm = LayerNorm(context, config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x [T, E]``, which is written, and ``y [T, in]`` to ``[T, E]``."""
        return self.LayerNorm.add_forward(x, self.dense.forward(y))


class Heads(Layer):
    """Attention of every token to the whole text."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        width = config.num_heads * config.head_dim
        self.qkv_proj = Linear(context, config.hidden_size, {"q": width, "k": width, "v": width}, bias=True)
        self._attention = Attention(context, config.num_heads, config.num_heads, config.head_dim)
        self._shape = (-1, 3 * config.num_heads, config.head_dim)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """``[T, E] -> [T, H * D]``."""
        q, k, v = self.qkv_proj.forward(x).view(self._shape).chunk(3, dim=1)
        return self._attention.attend(q, k, v, batch)


class SelfAttention(Layer):
    """Heads, and what follows them."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.heads = Heads(context, config)
        self.output = AddNorm(context, config.num_heads * config.head_dim, config)


class Intermediate(Layer):
    """The widening half of the feed-forward."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.dense = Linear(context, config.hidden_size, config.intermediate_size, bias=True)
        self._activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, E] -> [T, F]``."""
        return self._activation(self.dense.forward(x))


class EncoderLayer(Layer):
    """Attention and feed-forward."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.attention = SelfAttention(context, config)
        self.intermediate = Intermediate(context, config)
        self.output = AddNorm(context, config.intermediate_size, config)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """``[T, E] -> [T, E]``; ``x`` is written."""
        x = self.attention.output.forward(x, self.attention.heads.forward(x, batch))
        return self.output.forward(x, self.intermediate.forward(x))


class Embeddings(Layer):
    """What a token is, where it stands, and in which of two texts."""

    def __init__(self, context: LayerContext, config: ModelConfig, first_position: int) -> None:
        size = config.hidden_size
        num_types = config.hf.get("type_vocab_size", 2)
        if not isinstance(num_types, int) or not 0 < num_types < 1024:
            raise ConfigError(
                f"type_vocab_size is {num_types!r:.60}, but must be an integer in [1, 1024)", param="model"
            )
        self.word_embeddings = Embedding(context, config.vocab_size, size)
        self.position_embeddings = Embedding(context, config.max_position_embeddings, size)
        self.token_type_embeddings = Embedding(context, num_types, size)
        self.LayerNorm = LayerNorm(context, size, config.rms_norm_eps)
        self._first_position = first_position
        self._last_type = num_types - 1

    def forward(self, batch: ForwardBatch) -> Tensor:
        """``[T, E]``."""
        positions = batch.positions + self._first_position if self._first_position else batch.positions
        x = self.word_embeddings.forward(batch.input_ids)
        x += self.position_embeddings.forward(positions)
        types = torch.zeros_like(batch.input_ids) if batch.token_types is None else batch.token_types
        return self.LayerNorm.add_forward(x, self.token_type_embeddings.forward(types.clamp(max=self._last_type)))


class Encoder(Layer):
    """All layers."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        self.layer = [EncoderLayer(context, config) for _ in range(config.num_layers)]


class TanhDense(Layer):
    """A dense layer of the same width before a classifier."""

    def __init__(self, context: LayerContext, size: int) -> None:
        self.dense = Linear(context, size, size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[L, E] -> [L, E]``."""
        return self.dense.forward(x).tanh()


class RobertaHead(TanhDense):
    """RoBERTa's classifier."""

    def __init__(self, context: LayerContext, size: int, num_labels: int) -> None:
        super().__init__(context, size)
        self.out_proj = Linear(context, size, num_labels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[L, E] -> [L, N]``."""
        return self.out_proj.forward(super().forward(x))


class BertPoolingModel(Layer):
    """See PoolingModel."""

    backbone = "bert"
    """What stands before the names of a checkpoint with a head."""

    def __init__(self, config: ModelConfig, pooling: PoolingConfig, context: LayerContext) -> None:
        """Build the model with empty weights.

        Raises:
            ConfigError: A part of the config is not supported; names it.
        """
        for name, value in _UNSUPPORTED.items():
            if config.hf.get(name, value) != value:
                raise ConfigError(
                    f"model config: {name} is {config.hf[name]!r:.60}; only {value!r} is supported", param="model"
                )
        self.embeddings = Embeddings(context, config, self.first_position(config))
        self.encoder = Encoder(context, config)
        is_classifier = pooling.task == "classify"
        if is_classifier:
            self.add_head(context, config.hidden_size, pooling.num_labels)
        is_bare = config.architecture.endswith("Model")
        self.weight_map = WeightMap(
            prefixes=() if is_bare else (("classifier.", "classifier."), (f"{self.backbone}.", "")),
            shards=_SHARDS,
            ignored=_IGNORED if is_classifier else (*_IGNORED, "pooler.", "classifier."),
            renames=(("self", "heads"),),
        )

    def first_position(self, config: ModelConfig) -> int:
        """Row of the position table that the first token of a text has."""
        del config
        return 0

    def add_head(self, context: LayerContext, size: int, num_labels: int) -> None:
        """Build a classifier on the first state."""
        self.pooler = TanhDense(context, size)
        self.classifier = Linear(context, size, num_labels, bias=True)

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see PoolingModel."""
        x = self.embeddings.forward(batch) if hidden is None else hidden
        for layer in self.encoder.layer:
            x = layer.forward(x, batch)
        return x

    def project(self, pooled: Tensor) -> Tensor:
        """``[L, E] -> [L, N]``; see PoolingModel."""
        return self.classifier.forward(self.pooler.forward(pooled))


class RobertaPoolingModel(BertPoolingModel):
    """Positions begin behind that of padding; the head is a layer longer."""

    backbone = "roberta"

    def first_position(self, config: ModelConfig) -> int:
        """One more than the id of padding."""
        padding = config.hf.get("pad_token_id")
        padding = 1 if padding is None else padding
        if not isinstance(padding, int) or not 0 <= padding < config.max_position_embeddings:
            raise ConfigError(
                f"model config: pad_token_id is {padding!r:.60}, but must be an integer from 0", param="model"
            )
        return padding + 1

    def add_head(self, context: LayerContext, size: int, num_labels: int) -> None:
        """See BertPoolingModel."""
        self.classifier = RobertaHead(context, size, num_labels)

    def project(self, pooled: Tensor) -> Tensor:
        """See PoolingModel."""
        return self.classifier.forward(pooled)

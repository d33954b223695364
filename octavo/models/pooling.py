"""Models that pool: their registry, and decoders as embedders and classifiers.

A decoder's last state has seen the whole text, so any of them can embed: it runs without its output head, and a
classifier is one linear layer on that state. Encoders are in files of their own (``bert.py``).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig
from octavo.config.sections import PoolingConfig
from octavo.errors import ConfigError
from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.layers.parameter import Layer, ParameterSlot, collect_slots
from octavo.models.interface import CausalLM, PoolingModel, WeightMap
from octavo.models.registry import MODELS
from octavo.utils.registry import Registry

POOLING_MODELS = Registry(
    "pooling model architecture",
    "model",
    "octavo.pooling_models",
    {
        f"{family}{kind}": f"octavo.models.{module}"
        for family, module in {
            "Bert": "bert:BertPoolingModel",
            "Roberta": "bert:RobertaPoolingModel",
            "XLMRoberta": "bert:RobertaPoolingModel",
            "Camembert": "bert:RobertaPoolingModel",
            "ModernBert": "modernbert:ModernBertPoolingModel",
        }.items()
        for kind in ("Model", "ForMaskedLM", "ForSequenceClassification")
    },
)
_ENDINGS = ("ForSequenceClassification", "ForTokenClassification", "Model")


class PooledDecoder(Layer):
    """A decoder without its output head, with a classifier's if the checkpoint is one."""

    def __init__(self, decoder: CausalLM, config: ModelConfig, pooling: PoolingConfig, context: LayerContext) -> None:
        """Take over a decoder that was built without a head of its own."""
        self._decoder = decoder
        self._head_slots: dict[str, ParameterSlot] = {}
        self._head: Linear | None = None
        if pooling.task == "classify":
            self._head = Linear(context, config.hidden_size, pooling.num_labels)
            self._head_slots = {f"score.{name}": slot for name, slot in self._head.slots().items()}
        stored = decoder.weight_map
        self.weight_map = WeightMap(
            # Checkpoints of the backbone alone leave out its name ("layers.0...").
            prefixes=(("score.", "score."), *stored.prefixes, ("model.", "model."), ("", "model.")),
            shards=stored.shards,
            ignored=(*stored.ignored, "lm_head.")
            if pooling.task == "classify"
            else (*stored.ignored, "lm_head.", "score."),
            renames=stored.renames,
            stacks=stored.stacks,
        )

    def slots(self, prefix: str = "") -> dict[str, ParameterSlot]:
        """Those of the decoder under its own names, and the head's."""
        return {prefix + name: slot for name, slot in {**collect_slots(self._decoder), **self._head_slots}.items()}

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see PoolingModel."""
        return self._decoder.forward(batch, hidden)

    def project(self, pooled: Tensor) -> Tensor:
        """``[L, E] -> [L, N]``; see PoolingModel."""
        return pooled if self._head is None else self._head.forward(pooled)


def build_pooling_model(config: ModelConfig, pooling: PoolingConfig, context: LayerContext) -> PoolingModel:
    """The model of ``config.architecture`` with empty weights.

    Raises:
        ConfigError: There is neither an encoder nor a decoder of that architecture.
    """
    name = config.architecture
    if POOLING_MODELS.knows(name):
        return POOLING_MODELS.load(name)(config, pooling, context)
    decoder = next((_as_decoder(name, ending) for ending in ("", *_ENDINGS) if _as_decoder(name, ending)), None)
    if decoder is None:
        raise ConfigError(
            f"architecture {name!r} cannot pool: it is no encoder ({', '.join(POOLING_MODELS.names())}) and no decoder "
            f"of Octavo ({', '.join(MODELS.names())})"
            + ("; the code that the checkpoint brings is not run for models that pool" if config.code else ""),
            param="model",
        )
    # A tied head is no parameter of its own.
    backbone = replace(config, architecture=decoder, tie_word_embeddings=True)
    return PooledDecoder(MODELS.load(decoder)(backbone, context), config, pooling, context)


def _as_decoder(name: str, ending: str) -> str | None:
    """``Qwen3Model`` as ``Qwen3ForCausalLM``, if there is such a decoder."""
    if not name.endswith(ending):
        return None
    # The text halves of newer families say so in between: "Gemma3TextModel".
    found = f"{name[: len(name) - len(ending)].removesuffix('Text')}ForCausalLM" if ending else name
    return found if MODELS.knows(found) else None

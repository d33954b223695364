"""CausalLM and its WeightMap: the answer to "how do I add a model?". See docs/extending/model.md.

A model file holds mathematics only: it builds ``layers.*`` and calls them. It knows nothing of parallelism, kernels,
quantisation formats or attention backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from octavo.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class Shard:
    """A checkpoint tensor that becomes part of a fused parameter: ``q_proj`` is shard ``q`` of ``qkv_proj``."""

    source: str
    """Part of the checkpoint name, between dots: ``q_proj``."""
    target: str
    """What stands in its place in the parameter's name: ``qkv_proj``."""
    shard: str
    """Which part of the fused layer: q, k, v, gate or up."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A checkpoint tensor that holds something of every expert, one after another in its first dimension."""

    source: str
    """Last words of the checkpoint name: ``experts.gate_up_proj``."""
    targets: tuple[str, ...]
    """What an expert's share is called by itself, ``{}`` for its number: ``experts.{}.gate_proj.weight``. Several take
    equal parts of its rows."""
    is_transposed: bool = False
    """An expert's share is ``[in, out]``; else ``[out, in]``."""
    is_interleaved: bool = False
    """The targets' rows alternate; else one target's follow the other's."""


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Checkpoint names to parameter names, as data. Applied by ``loader/mapping.py``."""

    prefixes: tuple[tuple[str, str], ...] = ()
    """Rename a leading part: first match wins."""
    shards: tuple[Shard, ...] = ()
    ignored: tuple[str, ...] = ()
    """Checkpoint names that contain one of these are skipped knowingly (``rotary_emb.inv_freq``)."""
    renames: tuple[tuple[str, str], ...] = ()
    """Checkpoint's and our word for a part of a name between dots: ``("dense", "o_proj")``. An empty word
    of ours drops the part. Before ``shards``."""
    own: tuple[str, ...] = ()
    """Where a checkpoint holds more than this model: how names of its own begin. What begins otherwise, and has no
    parameter, is skipped knowingly. Empty: all names are its own."""
    stacks: tuple[Stack, ...] = ()
    """Tensors that are cut into one for each expert before anything else; theirs are then the names that count."""


class CausalLM(Protocol):
    """A language model. Constructed as ``Model(config: ModelConfig, context: LayerContext)`` with empty weights."""

    weight_map: ClassVar[WeightMap]

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """Hidden states ``[T, E]`` after the final norm. ``hidden`` is the previous pipeline stage's output."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[L, E] -> [L, V]``, in the dtype of the model."""
        ...


class PoolingModel(Protocol):
    """A model that makes vectors or scores. Constructed as ``Model(config, pooling, context)`` with empty weights."""

    weight_map: WeightMap

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """Hidden states ``[T, E]``; as CausalLM's."""
        ...

    def project(self, pooled: Tensor) -> Tensor:
        """``[L, E] -> [L, N]``: a classifier's head, in the dtype of the model; never called for embeddings."""
        ...


def is_recordable(model: object) -> bool:
    """Whether decode steps of a model may be recorded as graphs: a class says no by ``is_recordable = False``."""
    return bool(getattr(model, "is_recordable", True))

"""AttentionBackend: how a backend stores keys and values, plans a step and computes attention.

A backend knows nothing of requests, schedulers or models: only token counts, block tables and tensors. To add one,
read docs/extending/attention-backend.md; ``attention/torch_sdpa.py`` is the smallest complete one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, dtype

from octavo.batch import AttentionMetadata, StepShape


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the layers of one KV group ask of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: dtype
    """Of q, k, v and out."""
    kv_dtype: dtype
    """Of the cache."""
    scale: float
    """Multiplies q·k."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included."""
    logit_softcap: float | None = None
    has_sinks: bool = False
    """Every head has one more score in its softmax, learned, without a value (gpt-oss)."""
    is_bidirectional: bool = False
    """Every token sees the whole text, which is computed in one step; nothing is kept. ``sliding_window`` counts to
    each side then."""


@dataclass(frozen=True, slots=True)
class HeadPreparation:
    """What lies between the projection of queries, keys and values and attention: ``kernels.rope``."""

    norms: tuple[Tensor, Tensor, float] | None
    """Weights ``[D]`` of the RMSNorms of query and key heads, and epsilon."""
    table: Tensor
    """[max_positions, R / 2] complex64 rotations."""
    positions: Tensor
    """[T] int64."""


class AttentionBackend(Protocol):
    """One instance per KV group, made with its AttentionSpec and device type."""

    name: ClassVar[str]

    def __init__(self, spec: AttentionSpec) -> None: ...

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """Why this backend cannot serve ``spec``, in words fit for the log; None when it can."""
        ...

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's cache tensor, of ``spec.kv_dtype``."""
        ...

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> AttentionMetadata:
        """Prepare what all layers of the group share. Once per step."""
        ...

    def kv_views(self, cache: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of one layer's cache as ``[N, P, G, D]`` views of equal strides, last dimension contiguous.

        The kernel that rotates queries and keys then writes into them itself, and ``write`` is not called. None: the
        cache has no such form, or the backend is faster at writing.
        """
        ...

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """Write ``k`` and ``v`` ``[T, G, D]``, rotary embedding applied, at ``meta.slot_mapping``. Once per layer."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attend causally over the paged history. Once per layer, after this step's keys and values are written.

        Args:
            q: ``[T, H, D]``.
            k: ``[T, G, D]``, those of this step, rotary embedding applied.
            v: ``[T, G, D]``.
            cache: ``kv_shape()``.
            meta: What ``plan()`` returned.
            out: ``[T, H, D]``; written.
            sinks: ``[H]`` float32 where ``spec.has_sinks``: the layer's. Backends whose ``unsupported`` refuses such
                layers need not have the argument.
        """
        ...


class ProjectionBackend(AttentionBackend, Protocol):
    """A backend some of whose steps go from the projection on in one launch; ``plan`` says which: the metadata's
    ``takes_projection``. ``write`` and ``attend`` work with that metadata too."""

    def attend_projection(
        self, qkv: Tensor, heads: HeadPreparation, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Prepare heads, write keys and values, attend.

        Args:
            qkv: ``[T, (H + 2G) * D]``, as the projection left it; may be overwritten.
            heads: How queries and keys are prepared.
            cache: ``kv_shape()``, and ``kv_views`` are not None.
            meta: What ``plan()`` returned.
            out: ``[T, H, D]``; written.
            sinks: As in ``attend``.
        """
        ...


def unsupported_direction(backend: type[AttentionBackend], spec: AttentionSpec) -> str | None:
    """Why a backend cannot serve the direction in which the layers of ``spec`` look; None when it can. Backends for
    encoders say so by a class attribute ``is_bidirectional = True``."""
    looks_both_ways = bool(getattr(backend, "is_bidirectional", False))
    if looks_both_ways == spec.is_bidirectional:
        return None
    return "it is for encoders" if looks_both_ways else "its tokens see only those before them, and this is an encoder"


def is_capturable(backend: AttentionBackend) -> bool:
    """Whether decode steps may be recorded as graphs: ``plan``, ``write`` and ``attend`` of single queries take lengths
    and tables from device memory only. Backends say so by a class attribute ``is_capturable = True``."""
    return bool(getattr(backend, "is_capturable", False))

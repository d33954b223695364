"""QuantizationMethod: how the weight of a linear layer is stored and multiplied.

Knows no model and no checkpoint names. See docs/extending/quantization.md; ``unquantized.py`` is the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, dtype


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One (fused) linear layer."""

    in_features: int
    out_features: int
    dtype: dtype
    """Of activations and of the result."""


class QuantizationMethod(Protocol):
    """One instance per engine; the state of a layer is the dict of tensors it returns."""

    name: ClassVar[str]

    def create_weights(self, shape: LinearShape) -> dict[str, Tensor]:
        """Empty tensors that checkpoint shards are copied into. ``weight`` is ``[out, in]``."""
        ...

    def after_load(self, shape: LinearShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called once, as soon as every shard of this layer has arrived: repack, quantise, free what was loaded."""
        ...

    def apply(self, shape: LinearShape, weights: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [T, in] -> [T, out]``."""
        ...

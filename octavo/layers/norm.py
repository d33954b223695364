"""RMSNorm. Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019."""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.norm import add_rms_norm, rms_norm
from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer, Parameter


class RMSNorm(Layer):
    """Normalises the last dimension, then scales it by a learned weight."""

    def __init__(self, context: LayerContext, size: int, eps: float, *, order: Tensor | None = None) -> None:
        """Define a norm; ``order`` permutes the weight at load, as ``Linear``'s ``row_order`` does."""
        self.scale = context.empty(0)
        self._order = order
        self.eps = eps
        self.weight = Parameter((size,), lambda: context.empty(size), self._finish)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size] -> [..., size]``; ``x`` is left as it is."""
        return rms_norm(x, self.scale, self.eps)

    def add_forward(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """``residual += delta`` in place, then the norm of the sum: both ``[T, size]``. Without ``delta``, the norm."""
        if delta is None:
            return rms_norm(residual, self.scale, self.eps)
        return add_rms_norm(residual, delta, self.scale, self.eps)

    def _finish(self, weight: Tensor) -> None:
        self.scale = weight if self._order is None else weight[self._order]

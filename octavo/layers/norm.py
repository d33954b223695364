"""Norms of the last dimension. Papers: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019; Ba et
al., "Layer Normalization", 2016."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer, Parameter


class RMSNorm(Layer):
    """Normalises by the root mean square, then scales by a learned weight."""

    def __init__(
        self, context: LayerContext, size: int, eps: float, *, offset: float = 0.0, is_wide: bool = False
    ) -> None:
        """Define a norm.

        Args:
            context: Of the model.
            size: Of the last dimension.
            eps: Added to the mean square.
            offset: Added to the weight: checkpoints that store it around 0 want 1.
            is_wide: Multiply by the weight in float32 and round once; otherwise the normalised value is rounded before.
        """
        dtype = torch.float32 if is_wide else context.dtype
        self.scale = torch.empty(0, dtype=dtype, device=context.device)
        self._order: Tensor | None = None
        self._offset = offset
        self.eps = eps
        self.weight = Parameter((size,), lambda: torch.empty(size, dtype=dtype, device=context.device), self._finish)

    def permute(self, order: Tensor) -> None:
        """Let ``order`` permute the weight when it is loaded, as ``Linear``'s ``row_order`` does."""
        self._order = order

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size] -> [..., size]``; ``x`` is left as it is."""
        return rms_norm(x, self.scale, self.eps)

    def add_forward(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """``residual += delta`` in place, then the norm of the sum: both ``[T, size]``. Without ``delta``, the norm."""
        if delta is None:
            return rms_norm(residual, self.scale, self.eps)
        return add_rms_norm(residual, delta, self.scale, self.eps)

    def _finish(self, weight: Tensor) -> None:
        weight = weight if self._order is None else weight[self._order]
        self.scale = weight + self._offset if self._offset else weight


class LayerNorm(Layer):
    """Subtracts the mean, divides by the standard deviation, then applies a learned weight and bias."""

    def __init__(self, context: LayerContext, size: int, eps: float) -> None:
        self.eps = eps
        self._scale = self._shift = context.empty(0)
        self.weight = Parameter((size,), lambda: context.empty(size), self._finish_weight)
        self.bias = Parameter((size,), lambda: context.empty(size), self._finish_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size] -> [..., size]``; ``x`` is left as it is."""
        return layer_norm(x, self._scale, self._shift, self.eps)

    def add_forward(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """``residual += delta`` in place, then the norm of the sum: both ``[T, size]``. Without ``delta``, the norm."""
        if delta is None:
            return layer_norm(residual, self._scale, self._shift, self.eps)
        return add_layer_norm(residual, delta, self._scale, self._shift, self.eps)

    def _finish_weight(self, weight: Tensor) -> None:
        self._scale = weight

    def _finish_bias(self, bias: Tensor) -> None:
        self._shift = bias

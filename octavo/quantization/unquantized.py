"""Weights as they are, in the dtype of the model: the reference for every other method, and the smallest.

Float32 weights of a CPU are laid out for the compiled kernel where there is one, values untouched.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from octavo.kernels.linear import linear
from octavo.kernels.native import NativeKernels, native_kernels
from octavo.kernels.transient import transient
from octavo.quantization.method import LinearShape


class Unquantized:
    """A plain product."""

    name: ClassVar[str] = "none"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._native: NativeKernels | None = native_kernels() if self._device.type == "cpu" else None

    def create_weights(self, shape: LinearShape) -> dict[str, Tensor]:
        """See QuantizationMethod."""
        if self._is_packed(shape):
            return {"weight": transient(shape.out_features, shape.in_features)}
        return {"weight": torch.empty(shape.out_features, shape.in_features, dtype=shape.dtype, device=self._device)}

    def after_load(self, shape: LinearShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """See QuantizationMethod."""
        assert weights["weight"].shape == (shape.out_features, shape.in_features)
        if self._native is not None and self._is_packed(shape):
            return {"panels": self._native.pack_float32(weights["weight"])}
        return weights

    def apply(self, shape: LinearShape, weights: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """See QuantizationMethod."""
        assert x.shape[-1] == shape.in_features
        if self._native is not None and "panels" in weights:
            return self._native.linear_float32(x, weights["panels"], shape.out_features, bias)
        return linear(x, weights["weight"], bias)

    def _is_packed(self, shape: LinearShape) -> bool:
        return self._native is not None and shape.dtype is torch.float32

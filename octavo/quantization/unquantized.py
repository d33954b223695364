"""Weights as they are, in the dtype of the model: the reference for every other method, and the smallest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from octavo.kernels.linear import linear
from octavo.quantization.method import LinearShape


class Unquantized:
    """A plain product."""

    name: ClassVar[str] = "none"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def create_weights(self, shape: LinearShape) -> dict[str, Tensor]:
        """See QuantizationMethod."""
        return {"weight": torch.empty(shape.out_features, shape.in_features, dtype=shape.dtype, device=self._device)}

    def after_load(self, shape: LinearShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """See QuantizationMethod."""
        assert weights["weight"].shape == (shape.out_features, shape.in_features)
        return weights

    def plain_weight(self, weights: dict[str, Tensor]) -> Tensor:
        """``[out, in]``, for kernels that do more than multiply. Only methods that keep weights as they are have it."""
        return weights["weight"]

    def apply(self, shape: LinearShape, weights: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """See QuantizationMethod."""
        assert x.shape[-1] == shape.in_features
        return linear(x, weights["weight"], bias)

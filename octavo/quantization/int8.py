"""Int8 weights with one scale per output channel, chosen from the weights alone: no calibration data, any checkpoint.

Activations are rounded per row while multiplying. With the compiled kernel they keep 14 to 16 bits, so the weights'
rounding is all that is lost. Without a compiler, oneDNN multiplies 8-bit activations: coarser, and on processors
without VNNI its 16-bit sums would saturate, so weights are then held to 7 bits.
Paper: Dettmers et al., "LLM.int8()", 2022 (row and column scales).
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from torch import Tensor

from octavo.kernels.native import NativeKernels, native_kernels, native_status
from octavo.kernels.transient import transient
from octavo.quantization.method import LinearShape

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 1024


class Int8:
    """W8A16 by the compiled kernel, else W8A8 by oneDNN."""

    name: ClassVar[str] = "int8"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._native: NativeKernels | None = native_kernels()
        if self._native is None:
            logger.warning("int8 without compiled kernels rounds activations to 8 bits as well: %s", native_status())

    def create_weights(self, shape: LinearShape) -> dict[str, Tensor]:
        """See QuantizationMethod."""
        return {"weight": transient(shape.out_features, shape.in_features).to(self._device)}

    def after_load(self, shape: LinearShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Round the weight; the full-precision one is dropped."""
        assert weights["weight"].shape == (shape.out_features, shape.in_features)
        if self._native is not None:
            panels, scales = self._native.quantize_int8(weights["weight"])
            return {"panels": panels, "scale": scales}
        weight, scale = quantize_weight(weights["weight"], 127 if torch.cpu._is_vnni_supported() else 63)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        return {"weight": packed, "scale": scale, "zero_point": torch.zeros(len(scale), dtype=torch.int64)}

    def apply(self, shape: LinearShape, weights: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """See QuantizationMethod."""
        if self._native is not None:
            wide_bias = None if bias is None else bias.float()
            multiply = self._native.linear_int8
            return multiply(x.float(), weights["panels"], weights["scale"], shape.out_features, wide_bias).to(
                shape.dtype
            )
        return _linear_onednn(weights, x.float(), bias).to(shape.dtype)


def quantize_weight(weight: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """``[N, K]`` to int8 in ``[-limit, limit]`` and float32 scales ``[N]``, so that ``weight = int8 * scale``."""
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    # In pieces: the float32 copies of a whole output head would be the peak of the process's memory.
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].float()
        scale = rows.abs().amax(dim=1).clamp_min_(1e-30) / limit
        rounded[first : first + _ROWS_AT_ONCE] = (rows / scale[:, None]).round_()
        scales[first : first + _ROWS_AT_ONCE] = scale
    return rounded, scales


def linear_int8_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` times the dequantised weight, in float32, activations as they are."""
    out = x.float() @ (weight.float() * scale[:, None]).t()
    return out if bias is None else out + bias


def _linear_onednn(weights: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Activations as unsigned bytes around 128 with one scale per row; one scale for all ruins quality."""
    row_scale = x.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30) / 127
    rounded = (x / row_scale).round_().add_(128).to(torch.uint8)
    out = torch.ops.onednn.qlinear_pointwise(
        rounded, 1.0, 128, weights["weight"], weights["scale"], weights["zero_point"], None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    out.mul_(row_scale)
    return out if bias is None else out.add_(bias)

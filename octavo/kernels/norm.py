"""Root mean square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.native import native_kernels


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32.

    Args:
        x: ``[..., size]``, any float dtype; read only.
        weight: ``[size]``.
        eps: Added to the mean square.

    Returns:
        A new tensor of x's shape and dtype.
    """
    wide = x.float()
    return ((wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``rms_norm_ref``, in one pass: by the compiled kernel where it applies, else by torch's own operator."""
    if x.dtype is torch.float32 and x.dim() == 2 and x.is_contiguous():
        native = native_kernels()
        if native is not None and x.device.type == "cpu":
            return native.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)

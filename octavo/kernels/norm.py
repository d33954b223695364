"""Root mean square normalisation, alone and behind the addition to the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels
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
    """As ``rms_norm_ref``, in one pass: by a compiled kernel where one applies, else by torch's own operator."""
    if x.is_cuda and x.dim() == 2:
        return gpu_kernels("norm").rms_norm(x, weight, eps)
    if x.dtype is torch.float32 and x.dim() == 2 and x.is_contiguous():
        native = native_kernels()
        if native is not None and x.device.type == "cpu":
            return native.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_ref(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += delta``, then the norm of the sum.

    Args:
        residual: ``[T, size]``; written.
        delta: ``[T, size]``, of the same dtype.
        weight: ``[size]``.
        eps: Added to the mean square.

    Returns:
        A new ``[T, size]`` tensor, ``rms_norm_ref`` of the sum as it was stored.
    """
    residual += delta
    return rms_norm_ref(residual, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``add_rms_norm_ref``: in one pass by a compiled kernel where one applies."""
    if residual.is_cuda:
        return gpu_kernels("norm").add_rms_norm(residual, delta, weight, eps)
    if residual.dtype is torch.float32 and residual.is_contiguous() and delta.is_contiguous():
        native = native_kernels()
        if native is not None and residual.device.type == "cpu":
            return native.add_rms_norm(residual, delta, weight, eps)
    residual += delta
    return rms_norm(residual, weight, eps)

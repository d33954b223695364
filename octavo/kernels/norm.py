"""Normalisation, alone and behind the addition to the residual stream."""

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
        weight: ``[size]``. Of x's dtype: the normalised value is rounded to it before the product. In float32: it is
            rounded after.
        eps: Added to the mean square.

    Returns:
        A new tensor of x's shape and dtype.
    """
    wide = x.float()
    return ((wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(weight.dtype) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``rms_norm_ref``, in one pass: by a compiled kernel where one applies, else by torch's own operator."""
    if x.is_cuda and x.dim() == 2:
        return gpu_kernels("norm").rms_norm(x, weight, eps)
    if x.dtype is torch.float32 and x.dim() == 2 and x.is_contiguous():
        native = native_kernels()
        if native is not None and x.device.type == "cpu":
            return native.rms_norm(x, weight, eps)
    if weight.dtype is not x.dtype:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, computed in float32.

    Args:
        x: ``[..., size]``, any float dtype; read only.
        weight: ``[size]``, of the same dtype.
        bias: ``[size]``, of the same dtype.
        eps: Added to the variance.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``residual += delta``, both ``[T, size]``, then ``layer_norm`` of the sum."""
    residual += delta
    return layer_norm(residual, weight, bias, eps)

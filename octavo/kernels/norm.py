"""Root mean square normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    """As ``rms_norm_ref``, by torch's own operator, which is what is fastest on a CPU."""
    return F.rms_norm(x, weight.shape, weight, eps)

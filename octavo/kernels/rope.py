"""Rotary position embedding as a complex product.

The two numbers that rotate together lie side by side (``interleave_order`` puts checkpoint rows so), which makes a
rotation one complex multiplication: a single pass over queries and keys instead of six. Attention scores do not change
when the dimensions of q and k are permuted alike. Paper: Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.native import native_kernels


def interleave_order(head_dim: int, rotary_dim: int) -> Tensor:
    """``[head_dim]`` int64: index of each stored dimension in the half-split layout of Hugging Face checkpoints.

    There dimension ``i`` rotates with ``i + rotary_dim / 2``; the stored layout puts them at ``2i`` and ``2i + 1``.
    Dimensions from ``rotary_dim`` on do not rotate and stay.
    """
    half = rotary_dim // 2
    paired = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()
    return torch.cat((paired, torch.arange(rotary_dim, head_dim)))


def rotate_ref(x_THD: Tensor, rotation: Tensor) -> None:
    """Rotate neighbouring pairs of the first dimensions of each head, in place, by plain arithmetic.

    Args:
        x_THD: ``[T, H, D]`` float; written.
        rotation: ``[T, R / 2]`` complex64, ``R <= D``.
    """
    rotary_dim = 2 * rotation.shape[-1]
    cos, sin = rotation.real[:, None, :], rotation.imag[:, None, :]
    even, odd = x_THD[..., 0:rotary_dim:2].to(torch.float32, copy=True), x_THD[..., 1:rotary_dim:2].float()
    x_THD[..., 0:rotary_dim:2] = (even * cos - odd * sin).to(x_THD.dtype)
    x_THD[..., 1:rotary_dim:2] = (odd * cos + even * sin).to(x_THD.dtype)


def rotate(x_THD: Tensor, rotation: Tensor) -> None:
    """As ``rotate_ref``, in one pass; the heads of a token must be contiguous. In float32 by the compiled kernel where
    it applies, else as one complex product."""
    if x_THD.dtype is torch.float32 and x_THD.device.type == "cpu":
        native = native_kernels()
        if native is not None:
            native.rotate(x_THD, rotation)
            return
    rotary_dim = 2 * rotation.shape[-1]
    if rotary_dim != x_THD.shape[-1]:
        x_THD = x_THD[..., :rotary_dim]
    pairs = x_THD.unflatten(-1, (-1, 2))
    factor = rotation.unsqueeze(1)
    if x_THD.dtype is torch.float32:
        torch.view_as_complex(pairs).mul_(factor)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * factor))

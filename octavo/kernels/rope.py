"""Rotary position embedding as a complex product.

The two numbers that rotate together lie side by side (``interleave_order`` puts checkpoint rows so), which makes a
rotation one complex multiplication: a single pass over queries and keys instead of six. Attention scores do not change
when the dimensions of q and k are permuted alike. Paper: Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.native import native_kernels
from octavo.kernels.norm import rms_norm_ref


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
    if rotation.shape[-1] == 0:
        return  # a layer without positions
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


def norm_rotate_write_ref(
    qkv: Tensor, num_heads: int, num_kv_heads: int, norms: tuple[Tensor, Tensor, float] | None, table: Tensor,
    positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """All that lies between the projection of queries, keys and values and attention.

    Args:
        qkv: ``[T, (H + 2G) * D]``: query heads, key heads, value heads. Queries and keys are normalised and rotated in
            place.
        num_heads: H.
        num_kv_heads: G.
        norms: Weights ``[D]`` of the RMSNorm of each query head and of each key head, and eps; None for no norm.
        table: ``[max_positions, R / 2]`` complex64 rotations.
        positions: ``[T]`` int64 rows of the table.
        k_cache: ``[N, P, G, D]``, any strides; written.
        v_cache: As ``k_cache``.
        slot_mapping: ``[T]`` int64, ``block_id * P + offset``; -1 writes nothing to the cache.
    """
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q.copy_(rms_norm_ref(q, norms[0], norms[2]))
        k.copy_(rms_norm_ref(k, norms[1], norms[2]))
    rotate_ref(heads[:, : num_heads + num_kv_heads], table[positions])
    is_real = slot_mapping >= 0
    page = k_cache.shape[1]
    block, offset = slot_mapping[is_real] // page, slot_mapping[is_real] % page
    k_cache[block, offset] = k[is_real].to(k_cache.dtype)
    v_cache[block, offset] = v[is_real].to(v_cache.dtype)


def norm_rotate_write(
    qkv: Tensor, num_heads: int, num_kv_heads: int, norms: tuple[Tensor, Tensor, float] | None, table: Tensor,
    positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """As ``norm_rotate_write_ref``: in one launch on a GPU, where both caches have the same strides."""
    if not qkv.is_cuda:
        norm_rotate_write_ref(qkv, num_heads, num_kv_heads, norms, table, positions, k_cache, v_cache, slot_mapping)
        return
    gpu_kernels("rope").norm_rotate_write(
        qkv, num_heads, num_kv_heads, norms, torch.view_as_real(table), positions, k_cache, v_cache, slot_mapping
    )

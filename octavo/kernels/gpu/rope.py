"""One pass over a fused projection of queries, keys and values: norm of each head, rotation, write to the cache.

A program takes one token and a few of its heads. Neighbouring numbers rotate together, so a head is loaded as it lies
and split into pairs in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options

_HEADS = 4


@triton.jit
def rotation(table, position, D_PAD: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines ``[1, D_PAD / 2]`` of a position; dimensions from 2 HALF on do not turn."""
    pair = tl.arange(0, D_PAD // 2)
    row = table + position * (2 * HALF) + 2 * pair
    cos = tl.load(row, mask=pair < HALF, other=1.0)[None, :]
    sin = tl.load(row + 1, mask=pair < HALF, other=0.0)[None, :]
    return cos, sin


@triton.jit
def norm_rotate(
    wide, weight, cos, sin, eps, D: tl.constexpr, D_PAD: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """``[HEADS, D_PAD]`` float32 heads of one token, normalised with HAS_NORM by ``weight``, which broadcasts, rounded
    to ``dtype``, and turned. What lies beyond D is 0."""
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
        normed = (wide * scale[:, None]).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
        wide = normed.to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(wide, [HEADS, D_PAD // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, D_PAD])


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _norm_rotate_write(
    qkv, q_weight, k_weight, table, positions, slots, k_cache, v_cache, eps, stride_token, stride_page, stride_slot,
    stride_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offs = tl.arange(0, D_PAD)
    dtype = qkv.dtype.element_ty
    at = qkv + token * stride_token + head[:, None] * D + offs[None, :]
    mask = (head < H + 2 * G)[:, None] & (offs < D)[None, :]
    is_value = (head >= H + G)[:, None]
    wq = tl.zeros([D_PAD], q_weight.dtype.element_ty)
    wk = wq
    if HAS_NORM:
        wq = tl.load(q_weight + offs, mask=offs < D, other=0.0)
        wk = tl.load(k_weight + offs, mask=offs < D, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + token)
    cos, sin = rotation(table, tl.load(positions + token), D_PAD, HALF)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(at, mask=mask, other=0.0)
    weight = tl.where((head < H)[:, None], wq[None, :], wk[None, :])
    rotated = norm_rotate(x.to(tl.float32), weight, cos, sin, eps, D, D_PAD, HEADS, HAS_NORM, dtype)
    result = tl.where(is_value, x, rotated.to(dtype))
    tl.store(at, result, mask=mask & (head < H + G)[:, None])
    if slot >= 0:
        place = (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
        # Keys and values of a token share strides: they are halves of one tensor.
        group = tl.where(head >= H + G, head - H - G, head - H)[:, None]
        to = place + group * stride_head + offs[None, :]
        is_key = (head >= H)[:, None] & (head < H + G)[:, None]
        tl.store(k_cache + to, result.to(k_cache.dtype.element_ty), mask=mask & is_key)
        tl.store(v_cache + to, result.to(v_cache.dtype.element_ty), mask=mask & is_value)


def norm_rotate_write(
    qkv: Tensor, num_heads: int, num_kv_heads: int, norms: tuple[Tensor, Tensor, float] | None, table: Tensor,
    positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """As ``kernels.rope.norm_rotate_write_ref``, in one launch; ``table`` is ``[max_positions, R / 2, 2]`` float32.

    Both caches have the same strides, and a last dimension that is contiguous."""
    size = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    _norm_rotate_write[(len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))](
        qkv, q_weight, k_weight, table, positions, slot_mapping, k_cache, v_cache, eps, qkv.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        num_heads, num_kv_heads, size, triton.next_power_of_2(size), table.shape[1], k_cache.shape[1], _HEADS,
        norms is not None, has_pdl(), num_warps=1, **launch_options(),
    )  # fmt: skip

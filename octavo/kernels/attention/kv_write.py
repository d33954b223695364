"""Write a step's keys and values into their cache slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_write(
    k, v, cache, slots, k_stride_t, k_stride_g, v_stride_t, v_stride_g, stride_block, stride_kv, stride_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        offs = tl.arange(0, D_PAD)
        mask = offs < D
        to = cache + (slot // PAGE) * stride_block + head * stride_head + (slot % PAGE) * D + offs
        kd = tl.load(k + token.to(tl.int64) * k_stride_t + head * k_stride_g + offs, mask=mask)
        vd = tl.load(v + token.to(tl.int64) * v_stride_t + head * v_stride_g + offs, mask=mask)
        tl.store(to, kd.to(cache.dtype.element_ty), mask=mask)
        tl.store(to + stride_kv, vd.to(cache.dtype.element_ty), mask=mask)


def kv_write(k_TGD: Tensor, v_TGD: Tensor, cache_NKGPD: Tensor, slot_mapping_T: Tensor) -> None:
    """Write keys and values, in place.

    Args:
        k_TGD: ``[T, G, D]``, last dimension contiguous.
        v_TGD: As ``k_TGD``.
        cache_NKGPD: ``[N, 2, G, P, D]``, contiguous; written.
        slot_mapping_T: ``[T]`` int64, ``block_id * P + offset``; -1 is skipped.

    Reference: ``kv_write_ref``. Paper: Kwon et al., SOSP 2023, section 5.1.
    """
    tokens, heads, size = k_TGD.shape
    _kv_write[(tokens, heads)](
        k_TGD, v_TGD, cache_NKGPD, slot_mapping_T, k_TGD.stride(0), k_TGD.stride(1), v_TGD.stride(0), v_TGD.stride(1),
        *cache_NKGPD.stride()[:3], size, triton.next_power_of_2(size), cache_NKGPD.shape[3], num_warps=1,
    )  # fmt: skip


def kv_write_ref(k_TGD: Tensor, v_TGD: Tensor, cache_NKGPD: Tensor, slot_mapping_T: Tensor) -> None:
    """As ``kv_write``, by indexing."""
    page = cache_NKGPD.shape[3]
    is_real = slot_mapping_T >= 0
    slots = slot_mapping_T[is_real]
    cache_NKGPD[slots // page, 0, :, slots % page] = k_TGD[is_real].to(cache_NKGPD.dtype)
    cache_NKGPD[slots // page, 1, :, slots % page] = v_TGD[is_real].to(cache_NKGPD.dtype)

"""RMSNorm, alone and behind the addition to the residual stream: one program per row, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options


@triton.jit
def _add_rms_norm(
    residual, delta, weight, out, residual_stride, delta_stride, out_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    w = tl.load(weight + offs, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(residual + row * residual_stride + offs, mask=mask, other=0.0)
    if HAS_DELTA:
        x = x.to(tl.float32) + tl.load(delta + row * delta_stride + offs, mask=mask, other=0.0).to(tl.float32)
        # The stream is kept in its own dtype, and the norm sees what the next layer will see.
        x = x.to(residual.dtype.element_ty)
        tl.store(residual + row * residual_stride + offs, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    # A weight in float32 asks for one rounding, at the end; one of the stream's dtype for one before the product too.
    normed = (wide * scale).to(weight.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row * out_stride + offs, normed.to(out.dtype.element_ty), mask=mask)


def _launch(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    rows, size = residual.shape
    block = triton.next_power_of_2(size)
    _add_rms_norm[(rows,)](
        residual, residual if delta is None else delta, weight, out, residual.stride(0),
        0 if delta is None else delta.stride(0), out.stride(0), eps, size, block, delta is not None, has_pdl(),
        num_warps=min(8, max(1, block // 512)), **launch_options(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``kernels.norm.rms_norm_ref`` for ``[T, size]`` with contiguous rows. One launch."""
    return _launch(x, None, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``kernels.norm.add_rms_norm_ref`` for ``[T, size]`` with contiguous rows. One launch."""
    return _launch(residual, delta, weight, eps)

"""Gated activations over a fused gate-up projection: one launch, gate and up read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options
from octavo.kernels.gpu.products import ACTIVATIONS, act

_BLOCK = 1024


@triton.jit
def _gated(
    gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + row * stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    product = act(gate, ACT).to(out.dtype.element_ty).to(tl.float32) * up
    tl.store(out + row * SIZE + offs, product.to(out.dtype.element_ty), mask=mask)


def gated(gate_up: Tensor, is_gelu: bool) -> Tensor:
    """As ``kernels.activation.silu_and_mul_ref`` or ``gelu_tanh_and_mul_ref``, for ``[T, 2F]`` with contiguous rows."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(_BLOCK, triton.next_power_of_2(size))
    _gated[(rows, triton.cdiv(size, block))](
        gate_up,
        out,
        gate_up.stride(0),
        size,
        block,
        ACTIVATIONS["gelu_tanh" if is_gelu else "silu"],
        has_pdl(),
        num_warps=4,
        **launch_options(),
    )
    return out

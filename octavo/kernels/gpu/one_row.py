"""Products of one row with a weight, as fast as the weight can be read, with what stands before and behind them.

cuBLAS reaches 8 to 50 % of the bandwidth at one row. Here a program multiplies and adds a few of the weight's rows in
registers, without tensor cores, and asks for weights before the kernel before it is done. What a launch costs, 2.5 us,
is more than a small weight takes, so the addition to the residual stream and the norm before the product are parts of
it, and so is the gated activation behind it. Sizes: ``kernels/skinny.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options
from octavo.kernels.gpu.products import ACTIVATIONS, PLAIN, activate
from octavo.kernels.skinny import OneRowPlan


@triton.jit
def _normed(xs, weight, scale, dtype: tl.constexpr):
    """Rounded as gpu/norm.py does."""
    normed = (xs.to(tl.float32) * scale).to(weight.dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(dtype)


@triton.jit
def _one_row(
    x, weight, bias, norm_weight, out, N, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HELD: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row is loaded once for every one of BN outputs: it comes from the cache of the multiprocessor, and lies in
    registers as the weights do, so that nothing has to change places between threads before the sums."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    at = weight + rows[:, None] * K + columns[None, :]
    up_at = at + N * K
    along = tl.zeros([BN], tl.int32)[:, None] + columns[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    held = ()
    held_up = ()
    held_norm = ()
    for part in tl.static_range(HELD):
        held = held + (tl.load(at + part * BK),)
        if ACT != PLAIN:
            held_up = held_up + (tl.load(up_at + part * BK),)
        if NORM:
            held_norm = held_norm + (tl.load(norm_weight + along + part * BK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    xs = ()
    for part in tl.static_range(HELD):
        xs = xs + (tl.load(x + along + part * BK),)
    if ADD:
        before = tl.load(out + rows).to(tl.float32)
    scale = tl.full([BN, 1], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([BN, BK], tl.float32)
        for part in tl.static_range(HELD):
            squares += xs[part].to(tl.float32) * xs[part].to(tl.float32)
        for k in tl.range(HELD * BK, K, BK, num_stages=1):
            wide = tl.load(x + along + k).to(tl.float32)
            squares += wide * wide
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    acc = tl.zeros([BN, BK], tl.float32)
    up = tl.zeros([BN, BK], tl.float32)
    for part in tl.static_range(HELD):
        row = xs[part]
        if NORM:
            row = _normed(row, held_norm[part], scale, dtype)
        acc += held[part].to(tl.float32) * row.to(tl.float32)
        if ACT != PLAIN:
            up += held_up[part].to(tl.float32) * row.to(tl.float32)
    for k in tl.range(HELD * BK, K, BK, num_stages=1):
        w = tl.load(at + k)
        row = tl.load(x + along + k)
        if NORM:
            row = _normed(row, tl.load(norm_weight + along + k), scale, dtype)
        if ACT != PLAIN:
            up += tl.load(up_at + k).to(tl.float32) * row.to(tl.float32)
        acc += w.to(tl.float32) * row.to(tl.float32)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)
    if ACT != PLAIN:
        z = tl.sum(up, 1)
        if HAS_BIAS:
            z += tl.load(bias + N + rows).to(tl.float32)
        y = activate(y, z, ACT, out.dtype.element_ty)
    y = y.to(out.dtype.element_ty)
    if ADD:
        y = (before + y.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + rows, y)


def one_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: OneRowPlan, *, norm: tuple[Tensor, float] | None = None,
    act: str | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x [1, K]`` times ``weight [N, K]``, contiguous, plus ``bias [N]``: ``[1, N]``. One launch.

    Args:
        x: The row.
        weight: With ``act``, ``[2N, K]``, gates before ups.
        bias: As many as the weight has rows.
        plan: Its blocks divide the weight.
        norm: Weight ``[K]`` and epsilon of an RMSNorm of the row, before the product.
        act: ``silu`` or ``gelu_tanh``, of the gate, times the up.
        residual: ``[1, N]``, contiguous: the result is added to it, in place, and it is returned.

    Sums run in float32, and what would be a tensor between separate launches is rounded to x's dtype as there.
    """
    outputs, columns = weight.shape[0] // (1 if act is None else 2), weight.shape[1]
    assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device) if residual is None else residual
    norm_weight, eps = norm or (x, 0.0)
    _one_row[(outputs // plan.block_outputs,)](
        x, weight, x if bias is None else bias, norm_weight, out, outputs, eps,
        columns, plan.block_outputs, plan.block_columns, min(plan.held, columns // plan.block_columns),
        norm is not None, ACTIVATIONS[act], residual is not None, bias is not None, has_pdl(),
        num_warps=plan.num_warps, **launch_options(),
    )  # fmt: skip
    return out

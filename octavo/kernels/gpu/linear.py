"""Products of a few rows with a weight, as fast as the weight can be read.

cuBLAS is made for many rows: at one row it reaches 8 to 50 % of the bandwidth on small weights. One row is multiplied
and added in registers, without tensor cores; up to 32 rows become the narrow operand of a tensor core product whose
64 or 128 rows are the weight's. Which is used for what: ``kernels/linear.py``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options
from octavo.kernels.skinny import SkinnyPlan

_MAX_TILES = 4096


@triton.jit
def _input(x, norm_weight, columns, K, scale, INPUT: tl.constexpr):
    """Some columns of the row that is multiplied, as float32: ``x`` itself, its norm, or its gated halves."""
    dtype = x.dtype.element_ty
    value = tl.load(x + columns).to(tl.float32)
    # Rounded wherever the kernels that do these steps one by one round.
    if INPUT == 1:
        value = (value * scale).to(dtype).to(tl.float32) * tl.load(norm_weight + columns).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
    if INPUT >= 2:
        if INPUT == 3:
            value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        else:
            value = value * tl.sigmoid(value)
        value = value.to(dtype).to(tl.float32) * tl.load(x + K + columns).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def _gemv(
    x, weight, bias, norm_weight, out, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, K_PAD: tl.constexpr, HAS_BIAS: tl.constexpr, INPUT: tl.constexpr,
    ADD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. Early: the first weights are requested before the row is there; 1: and later ones a tile ahead.

    With ADD the product is added to ``out``, every element of which is one program's alone.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    at = weight + rows[:, None] * K + columns[None, :]
    if PDL and EARLY > 0:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY > 0:
        w = tl.load(at)
    if PDL:
        tl.extra.cuda.gdc_wait()
    scale = 1.0
    if INPUT == 1:
        every = tl.arange(0, K_PAD)
        whole = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 0) / K + eps)
    acc = tl.zeros([BN, BK], tl.float32)
    if EARLY == 1:
        for k in tl.range(0, K, BK):
            ahead = tl.load(at + k + BK, mask=(k + BK + columns)[None, :] < K, other=0.0)
            acc += w.to(tl.float32) * _input(x, norm_weight, k + columns, K, scale, INPUT)[None, :]
            w = ahead
    else:
        start = 0
        if EARLY == 2:
            acc += w.to(tl.float32) * _input(x, norm_weight, columns, K, scale, INPUT)[None, :]
            start = BK
        for k in tl.range(start, K, BK, num_stages=1):
            acc += tl.load(at + k).to(tl.float32) * _input(x, norm_weight, k + columns, K, scale, INPUT)[None, :]
    if PDL and EARLY == 0:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)
    if ADD:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(out + rows).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def _gemm(
    x, weight, bias, out, partial, counts, M, N, K, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``M <= BM`` rows. K is cut into SPLIT parts; whichever program of a tile comes last adds the parts, in order."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, BM)
    outputs = tile * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    span = tl.cdiv(K, BK * SPLIT) * BK
    low = split * span
    acc = tl.zeros([BN, BM], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for k in tl.range(low, tl.minimum(low + span, K), BK, num_stages=STAGES):
        w = tl.load(weight + outputs[:, None] * K + (k + columns)[None, :])
        xs = tl.load(x + rows[:, None] * x_stride + (k + columns)[None, :], mask=(rows < M)[:, None], other=0.0)
        acc = tl.dot(w, tl.trans(xs), acc, input_precision=PRECISION)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.trans(acc)
    at = rows[:, None] * N + outputs[None, :]
    mask = (rows < M)[:, None] & (outputs < N)[None, :]
    if SPLIT > 1:
        tl.store(partial + split * BM * N + at, y)
        tl.debug_barrier()
        arrived = tl.atomic_add(counts + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            y = tl.zeros([BM, BN], tl.float32)
            for part in tl.static_range(SPLIT):
                y += tl.load(partial + part * BM * N + at, cache_modifier=".cg")
            if HAS_BIAS:
                y += tl.load(bias + outputs).to(tl.float32)[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
            tl.store(counts + tile, 0)
    else:
        if HAS_BIAS:
            y += tl.load(bias + outputs).to(tl.float32)[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@functools.cache
def _counts(device: torch.device) -> Tensor:
    """Arrivals of each tile, 0 between two products; shared by all of them, which follow one another in one stream.

    Made at the first product, which must not be while a graph is recorded: the graph would own it.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: SkinnyPlan) -> Tensor:
    """``x [M, K]`` times ``weight [N, K]``, contiguous, plus ``bias [N]``: ``[M, N]``. One launch.

    Reference: ``torch.nn.functional.linear``. Sums run in float32.
    """
    rows, columns = x.shape
    outputs = weight.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if plan.block_rows == 1:
        multiply_row(x, weight, bias, out, plan)
        return out
    shift = out if bias is None else bias
    options = launch_options()
    tiles = outputs // plan.block_outputs
    if plan.split > 1:
        partial = torch.empty((plan.split, plan.block_rows, outputs), dtype=torch.float32, device=x.device)
        counts = _counts(x.device)
    else:
        partial = counts = out
    _gemm[(tiles, plan.split)](
        x, weight, shift, out, partial, counts, rows, outputs, columns, x.stride(0),
        plan.block_rows, plan.block_outputs, plan.block_columns, plan.split, plan.stages, bias is not None,
        "tf32" if x.element_size() == 2 else "ieee", has_pdl(), num_warps=plan.num_warps, **options,
    )  # fmt: skip
    return out


def multiply_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, plan: SkinnyPlan, *,
    norm: tuple[Tensor, float] | None = None, gate: int = 0, adds: bool = False,
) -> None:  # fmt: skip
    """One row's product into ``out [1, N]``; see ``kernels.linear.row_linear``. One launch."""
    columns = weight.shape[1]
    norm_weight, eps = norm or (x, 0.0)
    _gemv[(weight.shape[0] // plan.block_outputs,)](
        x, weight, out if bias is None else bias, norm_weight, out, columns, eps,
        plan.block_outputs, plan.block_columns, triton.next_power_of_2(columns), bias is not None,
        1 if norm is not None else (0, 2, 3)[gate], adds, plan.early, has_pdl(), num_warps=plan.num_warps,
        **launch_options(),
    )  # fmt: skip

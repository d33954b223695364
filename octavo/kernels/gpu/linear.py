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
def _gemv(
    x, weight, bias, out, K, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. The first weights are requested before the row is there."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    at = weight + rows[:, None] * K + columns[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(at)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = w.to(tl.float32) * tl.load(x + columns).to(tl.float32)[None, :]
    for k in tl.range(BK, K, BK, num_stages=1):
        acc += tl.load(at + k).to(tl.float32) * tl.load(x + k + columns).to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias + rows).to(tl.float32)
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
    shift = out if bias is None else bias
    options = launch_options()
    if plan.block_rows == 1:
        _gemv[(outputs // plan.block_outputs,)](
            x, weight, shift, out, columns, plan.block_outputs, plan.block_columns, bias is not None,
            has_pdl(), num_warps=plan.num_warps, **options,
        )  # fmt: skip
        return out
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

"""Products of up to 256 rows with a weight, as fast as the weight can be read; with gate and up, their activation too.

cuBLAS is made for many rows: at one row it reaches 8 to 50 % of the bandwidth on small weights, and at 64 to 256 its
tiles are too large to give every processor one. One row goes to ``one_row.py``; up to 32 rows become the narrow operand
of a tensor core product whose 64 or 128 rows are the weight's; more are tiles as usual, chosen so that the machine is
full. Which is used for what: ``kernels/skinny.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.gpu.launch import arrivals, has_pdl, launch_options
from octavo.kernels.gpu.products import ACTIVATIONS, PLAIN, activate, multiply
from octavo.kernels.skinny import SkinnyPlan

_PREFETCHED_BYTES = 16 * 2**20
"""Of a weight. The L2 cache holds 50 MB, and kernels launched early may prefetch for two products at once."""


@triton.jit
def _prefetch(weight, first, last, low, K, part, parts, chunk, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Ask ``chunk`` columns for each thread into L2: of rows from ``first``, columns from ``low``. Programs that share
    these rows are ``parts``, and this one is ``part``."""
    lanes: tl.constexpr = ROWS if ROWS > THREADS else THREADS
    lane = tl.arange(0, lanes)
    row = tl.minimum(first + lane % ROWS, last)
    column = tl.minimum(low + (lane // ROWS * parts + part) * chunk, K - chunk)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [(weight + row * K + column).to(tl.int64), tl.full([lanes], 1, tl.int32) * (chunk * 2)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tile(source, first, k, end, stride, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr):
    """``[ROWS, BK]`` of rows from ``first``, columns from ``k``. By TMA, what lies outside is 0; else rows from ``end``
    are, where MASKED."""
    if TMA:
        tile = source.load([first, k])
    else:
        rows = first + tl.arange(0, ROWS)
        at = source + rows[:, None] * stride + (k + tl.arange(0, BK))[None, :]
        if MASKED:
            tile = tl.load(at, mask=(rows < end)[:, None], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _sum_parts(partial, size, at, mask, SPLIT: tl.constexpr):
    """In the order of the columns, whoever came last."""
    y = tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT):
        y += tl.load(partial + part * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    return y


@triton.jit
def _finish(
    y, up, bias, out, at, outputs, N, mask, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add the bias; activate with the roundings that a product and ``gpu/activation.py`` after it have; store."""
    if HAS_BIAS:
        y += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    if ACT != PLAIN:
        if HAS_BIAS:
            up += tl.load(bias + N + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
        y = activate(y, up, ACT, out.dtype.element_ty)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "tiles_m", "chunk"])
def _gemm(
    x, weight, raw_weight, bias, out, partial, counts, M, N, K, x_stride, tiles_m, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    STEPS: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of the ``[M, N]`` result. K is cut into SPLIT parts; whichever program of a tile comes last adds them, in
    order. With ACT the weight has 2N rows, gates first. Neighbouring programs share weights."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_row = tile % tiles_m * BM
    first_output = tile // tiles_m * BN
    span = STEPS * BK if STAGES == 1 else tl.cdiv(K, BK * SPLIT) * BK
    low = split * span
    if PREFETCH:
        _prefetch(raw_weight, first_output, N - 1, low, K, tile % tiles_m, tiles_m, chunk, BN, THREADS)
        if ACT != PLAIN:
            _prefetch(raw_weight, N + first_output, 2 * N - 1, low, K, tile % tiles_m, tiles_m, chunk, BN, THREADS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
    if STAGES == 1:
        # All columns in one or two steps: the weights are here before x is.
        w = _tile(weight, first_output, low, N, K, BN, BK, TMA, False)
        if ACT != PLAIN:
            w_up = _tile(weight, N + first_output, low, N, K, BN, BK, TMA, False)
        if STEPS == 2:
            w_2 = _tile(weight, first_output, low + BK, N, K, BN, BK, TMA, False)
            if ACT != PLAIN:
                w_up_2 = _tile(weight, N + first_output, low + BK, N, K, BN, BK, TMA, False)
        if PDL:
            tl.extra.cuda.gdc_wait()
        xs = _tile(x, first_row, low, M, x_stride, BM, BK, TMA, True)
        acc = multiply(acc, xs, w, SWAP, PRECISION)
        if ACT != PLAIN:
            up = multiply(up, xs, w_up, SWAP, PRECISION)
        if STEPS == 2:
            xs_2 = _tile(x, first_row, low + BK, M, x_stride, BM, BK, TMA, True)
            acc = multiply(acc, xs_2, w_2, SWAP, PRECISION)
            if ACT != PLAIN:
                up = multiply(up, xs_2, w_up_2, SWAP, PRECISION)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        for k in tl.range(low, tl.minimum(low + span, K), BK, num_stages=STAGES):
            xs = _tile(x, first_row, k, M, x_stride, BM, BK, TMA, True)
            acc = multiply(acc, xs, _tile(weight, first_output, k, N, K, BN, BK, TMA, False), SWAP, PRECISION)
            if ACT != PLAIN:
                w_up = _tile(weight, N + first_output, k, N, K, BN, BK, TMA, False)
                up = multiply(up, xs, w_up, SWAP, PRECISION)
    if SWAP:
        acc = tl.trans(acc)
        up = tl.trans(up)
    rows = first_row + tl.arange(0, BM)
    outputs = first_output + tl.arange(0, BN)
    at = rows[:, None] * N + outputs[None, :]
    mask = (rows < M)[:, None] & (outputs < N)[None, :]
    if SPLIT > 1:
        size = M * N
        tl.store(partial + split * size + at, acc, mask=mask)
        if ACT != PLAIN:
            tl.store(partial + (SPLIT + split) * size + at, up, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counts + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            y = _sum_parts(partial, size, at, mask, SPLIT)
            other = y
            if ACT != PLAIN:
                other = _sum_parts(partial + SPLIT * size, size, at, mask, SPLIT)
            _finish(y, other, bias, out, at, outputs, N, mask, ACT, HAS_BIAS)
            tl.store(counts + tile, 0)
    else:
        _finish(acc, up, bias, out, at, outputs, N, mask, ACT, HAS_BIAS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: SkinnyPlan) -> Tensor:
    """``x [M, K]`` times ``weight [N, K]``, contiguous, plus ``bias [N]``: ``[M, N]``. One launch.

    Reference: ``torch.nn.functional.linear``. Sums run in float32. With TMA, x and its rows begin at multiples
    of 16 bytes. Without, blocks divide the weight.
    """
    return _tiled(x, weight, bias, plan, weight.shape[0], None)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: SkinnyPlan, *, act: str) -> Tensor:
    """``act(gate) * up`` of the product ``x [M, K]`` times ``weight [2F, K]``, gates first: ``[M, F]``. One launch.

    Rounded as ``linear`` and ``gpu/activation.py`` after it. ``act``: ``silu`` or ``gelu_tanh``. Else as ``linear``.
    """
    return _tiled(x, weight, bias, plan, weight.shape[0] // 2, act)


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None, plan: SkinnyPlan, outputs: int, act: str | None) -> Tensor:
    rows, columns = x.shape
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    halves = 1 if act is None else 2
    tiles_m, tiles_n = triton.cdiv(rows, plan.block_rows), triton.cdiv(outputs, plan.block_outputs)
    if plan.split > 1:
        partial = torch.empty(halves * plan.split * rows * outputs, dtype=torch.float32, device=x.device)
        counts = arrivals(x.device)
    else:
        partial = counts = out
    if plan.uses_tma:
        source = TensorDescriptor(x, [rows, columns], [x.stride(0), 1], [plan.block_rows, plan.block_columns])
        held = TensorDescriptor(
            weight, [halves * outputs, columns], [columns, 1], [plan.block_outputs, plan.block_columns]
        )
    else:
        assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0
        source, held = x, weight
    steps = triton.cdiv(columns, plan.block_columns * plan.split) if plan.stages == 1 else 0
    assert steps <= 2
    threads = 32 * plan.num_warps
    chunk = _chunk(plan, tiles_m, halves * outputs, columns, threads)
    _gemm[(tiles_m * tiles_n, plan.split)](
        source, held, weight, out if bias is None else bias, out, partial, counts, rows, outputs, columns, x.stride(0),
        tiles_m, chunk, plan.block_rows, plan.block_outputs, plan.block_columns, plan.split, plan.stages, steps,
        plan.is_swapped, plan.uses_tma, ACTIVATIONS[act], bias is not None, "tf32" if x.element_size() == 2 else "ieee",
        threads, plan.prefetches and has_pdl(), has_pdl(), num_warps=plan.num_warps, **launch_options(),
    )  # fmt: skip
    return out


def _chunk(plan: SkinnyPlan, tiles_m: int, weight_rows: int, columns: int, threads: int) -> int:
    """Columns that one thread prefetches: whole lines of 128 bytes."""
    span = triton.cdiv(columns, plan.block_columns * plan.split) * plan.block_columns
    wanted = min(span, _PREFETCHED_BYTES // (2 * weight_rows * plan.split))
    return min(max(64, wanted // (tiles_m * max(1, threads // plan.block_outputs)) // 64 * 64), columns // 8 * 8)

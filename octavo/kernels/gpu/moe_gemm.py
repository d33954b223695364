"""The two products of a mixture of experts: gate and up with the activation behind them, and down.

Two forms. *Tiles*: rows sorted by expert (``kernels/moe/align.py``), one expert a program, tensor cores. *Pairs*: for
so few tokens that hardly two share an expert, one row at a time in registers, which needs no sorting; the down product
then adds a token's experts itself. Sizes: ``kernels/moe/plans.py``. Sums run in float32; no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options, settle_names
from octavo.kernels.gpu.products import ACTIVATIONS, CLAMPED_SWIGLU, act, multiply
from octavo.kernels.moe.align import Tiles
from octavo.kernels.moe.plans import PairSizes, TileSizes


@triton.jit
def _activate(gate, up, ACT: tl.constexpr, alpha, limit):
    if ACT == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        result = act(gate, ACT) * up
    return result


settle_names(_activate)


@triton.jit
def _tile_of(pid, num_n, limit, GROUP: tl.constexpr):
    """Neighbouring programs share weights: GROUP tiles of rows for one part of the outputs, then the next part."""
    per_group = GROUP * num_n
    first = pid // per_group * GROUP
    size = tl.minimum(limit - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit
def _load_weight(at, columns, k, SIZE, EVEN: tl.constexpr):
    if EVEN:
        w = tl.load(at + k)
    else:
        w = tl.load(at + k, mask=(k + columns < SIZE)[None, :], other=0.0)
    return w


@triton.jit(do_not_specialize=["num_pairs", "limit"])
def _gate_up_tiles(
    x, weight, bias, out, pairs, owners, num_pairs, limit, x_stride, alpha, limit_value,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (F + BN - 1) // BN
    even_k: tl.constexpr = E % BK == 0
    tile, part = _tile_of(tl.program_id(0), num_n, limit, GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.load(owners + tile).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs + tile * BM + tl.arange(0, BM))
        is_real = pair < num_pairs
        token = tl.where(is_real, pair // K, 0).to(tl.int64)
        outputs = part * BN + tl.arange(0, BN)
        # Outputs beyond the end repeat the last one; they are not stored.
        held = tl.minimum(outputs, F - 1)
        columns = tl.arange(0, BK)
        x_at = x + token[:, None] * x_stride + columns[None, :]
        gate_at = weight + (expert * (2 * F) + held)[:, None] * E + columns[None, :]
        up_at = gate_at + F * E
        if SWAP:
            gate = tl.zeros([BN, BM], tl.float32)
            up = tl.zeros([BN, BM], tl.float32)
        else:
            gate = tl.zeros([BM, BN], tl.float32)
            up = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, E, BK, num_stages=STAGES):
            if even_k:
                xs = tl.load(x_at + k, mask=is_real[:, None], other=0.0)
            else:
                xs = tl.load(x_at + k, mask=is_real[:, None] & (k + columns < E)[None, :], other=0.0)
            gate = multiply(gate, xs, _load_weight(gate_at, columns, k, E, even_k), SWAP, PRECISION)
            up = multiply(up, xs, _load_weight(up_at, columns, k, E, even_k), SWAP, PRECISION)
        if SWAP:
            gate = tl.trans(gate)
            up = tl.trans(up)
        if HAS_BIAS:
            gate += tl.load(bias + expert * (2 * F) + held).to(tl.float32)[None, :]
            up += tl.load(bias + expert * (2 * F) + F + held).to(tl.float32)[None, :]
        result = _activate(gate, up, ACT, alpha, limit_value)
        at = out + pair.to(tl.int64)[:, None] * F + outputs[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=is_real[:, None] & (outputs < F)[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_pairs", "limit"])
def _down_tiles(
    h, weight, bias, scale, out, pairs, owners, num_pairs, limit,
    E: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (E + BN - 1) // BN
    even_k: tl.constexpr = F % BK == 0
    tile, part = _tile_of(tl.program_id(0), num_n, limit, GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.load(owners + tile).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs + tile * BM + tl.arange(0, BM))
        is_real = pair < num_pairs
        row = tl.where(is_real, pair, 0).to(tl.int64)
        outputs = part * BN + tl.arange(0, BN)
        held = tl.minimum(outputs, E - 1)
        columns = tl.arange(0, BK)
        h_at = h + row[:, None] * F + columns[None, :]
        w_at = weight + (expert * E + held)[:, None] * F + columns[None, :]
        if SWAP:
            acc = tl.zeros([BN, BM], tl.float32)
        else:
            acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, F, BK, num_stages=STAGES):
            if even_k:
                hs = tl.load(h_at + k, mask=is_real[:, None], other=0.0)
            else:
                hs = tl.load(h_at + k, mask=is_real[:, None] & (k + columns < F)[None, :], other=0.0)
            acc = multiply(acc, hs, _load_weight(w_at, columns, k, F, even_k), SWAP, PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        if HAS_BIAS:
            acc += tl.load(bias + expert * E + held).to(tl.float32)[None, :]
        acc *= tl.load(scale + row, mask=is_real, other=0.0)[:, None]
        at = out + row[:, None] * E + outputs[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=is_real[:, None] & (outputs < E)[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def gate_up_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, tiles: Tiles, sizes: TileSizes,
    activation: tuple[str, float, float],
) -> Tensor:  # fmt: skip
    """``act(gate) * up`` of each pair: ``[T * K, F]`` of x's dtype, in the order of pairs.

    Args:
        x: ``[T, E]``, rows contiguous.
        weight: ``[X, 2F, E]``, gate rows before up rows, contiguous.
        bias: ``[X, 2F]``.
        top_k: K.
        tiles: From ``align`` with ``sizes.rows`` rows.
        sizes: Of the tiles.
        activation: Kind, alpha and limit; see ``kernels.moe.experts.Activation``.
    """
    num_pairs = len(x) * top_k
    inner, columns = weight.shape[1] // 2, weight.shape[2]
    out = torch.empty((num_pairs, inner), dtype=x.dtype, device=x.device)
    limit = len(tiles.experts)
    _gate_up_tiles[(limit * triton.cdiv(inner, sizes.outputs),)](
        x, weight, out if bias is None else bias, out, tiles.pairs, tiles.experts, num_pairs, limit, x.stride(0),
        activation[1], activation[2], inner, columns, top_k, sizes.rows, sizes.outputs, sizes.columns, sizes.group,
        sizes.stages, sizes.is_swapped, ACTIVATIONS[activation[0]], bias is not None, _precision(x), has_pdl(),
        num_warps=sizes.num_warps, **launch_options(),
    )  # fmt: skip
    return out


def down_tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, tiles: Tiles, sizes: TileSizes
) -> Tensor:
    """Each pair's output times its routing weight: ``[T * K, E]`` of h's dtype, in the order of pairs.

    Args:
        h: ``[T * K, F]``, contiguous.
        weight: ``[X, E, F]``, contiguous.
        bias: ``[X, E]``.
        weights: ``[T, K]`` float32, contiguous.
        tiles: From ``align`` with ``sizes.rows`` rows.
        sizes: Of the tiles.
    """
    num_pairs, (outputs, inner) = len(h), weight.shape[1:]
    out = torch.empty((num_pairs, outputs), dtype=h.dtype, device=h.device)
    limit = len(tiles.experts)
    _down_tiles[(limit * triton.cdiv(outputs, sizes.outputs),)](
        h, weight, out if bias is None else bias, weights, out, tiles.pairs, tiles.experts, num_pairs, limit,
        outputs, inner, sizes.rows, sizes.outputs, sizes.columns, sizes.group, sizes.stages, sizes.is_swapped,
        bias is not None, _precision(h), has_pdl(), num_warps=sizes.num_warps, **launch_options(),
    )  # fmt: skip
    return out


@triton.jit
def _gate_up_pairs(
    x, weight, bias, experts, out, x_stride, alpha, limit_value,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(outputs, F - 1)
    columns = tl.arange(0, BK)
    even_k: tl.constexpr = E % BK == 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.load(experts + pair).to(tl.int64)
    x_at = x + (pair // K).to(tl.int64) * x_stride + columns
    gate_at = weight + (expert * (2 * F) + held)[:, None] * E + columns[None, :]
    up_at = gate_at + F * E
    gate = tl.zeros([BN, BK], tl.float32)
    up = tl.zeros([BN, BK], tl.float32)
    # A tile ahead: nothing else overlaps loads with sums outside of tensor core loops.
    next_gate = _load_weight(gate_at, columns, 0, E, even_k)
    next_up = _load_weight(up_at, columns, 0, E, even_k)
    for k in tl.range(0, E, BK, num_stages=1):
        w_gate = next_gate
        w_up = next_up
        is_there = (k + BK + columns < E)[None, :]
        next_gate = tl.load(gate_at + k + BK, mask=is_there, other=0.0)
        next_up = tl.load(up_at + k + BK, mask=is_there, other=0.0)
        xs = tl.load(x_at + k, mask=k + columns < E, other=0.0).to(tl.float32)[None, :]
        gate += w_gate.to(tl.float32) * xs
        up += w_up.to(tl.float32) * xs
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.sum(gate, 1)
    u = tl.sum(up, 1)
    if HAS_BIAS:
        g += tl.load(bias + expert * (2 * F) + held).to(tl.float32)
        u += tl.load(bias + expert * (2 * F) + F + held).to(tl.float32)
    result = _activate(g, u, ACT, alpha, limit_value)
    tl.store(out + pair.to(tl.int64) * F + outputs, result.to(out.dtype.element_ty), mask=outputs < F)


@triton.jit
def _down_pairs(
    h, weight, bias, experts, scale, out,
    E: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """All experts of a token, one after the other, so that their sum needs no further pass."""
    token = tl.program_id(1)
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(outputs, E - 1)
    columns = tl.arange(0, BK)
    steps: tl.constexpr = (F + BK - 1) // BK
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BN, BK], tl.float32)
    shift = tl.zeros([BN], tl.float32)
    first = tl.load(experts + token * K).to(tl.int64)
    ahead = tl.load(weight + (first * E + held)[:, None] * F + columns[None, :], mask=(columns < F)[None, :], other=0.0)
    for step in tl.range(0, K * steps, num_stages=1):
        w = ahead
        following = step + 1
        k_next = tl.minimum(following // steps, K - 1)
        expert_next = tl.load(experts + token * K + k_next).to(tl.int64)
        at = (following % steps) * BK + columns
        ahead = tl.load(
            weight + (expert_next * E + held)[:, None] * F + at[None, :],
            mask=((at < F) & (following < K * steps))[None, :],
            other=0.0,
        )
        k = step // steps
        pair = token * K + k
        now = (step % steps) * BK + columns
        factor = tl.load(scale + pair)
        hs = tl.load(h + pair.to(tl.int64) * F + now, mask=now < F, other=0.0).to(tl.float32) * factor
        total += w.to(tl.float32) * hs[None, :]
        if HAS_BIAS:
            if step % steps == 0:
                expert = tl.load(experts + pair).to(tl.int64)
                shift += factor * tl.load(bias + expert * E + held).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(total, 1) + shift
    tl.store(out + token.to(tl.int64) * E + outputs, y.to(out.dtype.element_ty), mask=outputs < E)


def experts_by_pairs(
    x: Tensor, gate_up: tuple[Tensor, Tensor | None], down: tuple[Tensor, Tensor | None], weights: Tensor,
    experts: Tensor, sizes: PairSizes, activation: tuple[str, float, float],
) -> Tensor:  # fmt: skip
    """The whole mixture for few tokens, in two launches: ``[T, E]``.

    Args:
        x: ``[T, E]``, rows contiguous.
        gate_up: Weight ``[X, 2F, E]`` and bias ``[X, 2F]``.
        down: Weight ``[X, E, F]`` and bias ``[X, E]``.
        weights: ``[T, K]`` float32.
        experts: ``[T, K]`` int32.
        sizes: Of the programs.
        activation: Kind, alpha and limit.
    """
    (tokens, top_k), (size, inner) = experts.shape, down[0].shape[1:]
    h = torch.empty((tokens * top_k, inner), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    options = launch_options()
    _gate_up_pairs[(triton.cdiv(inner, sizes.gate_up_outputs), tokens * top_k)](
        x, gate_up[0], h if gate_up[1] is None else gate_up[1], experts, h, x.stride(0), activation[1], activation[2],
        inner, size, top_k, sizes.gate_up_outputs, sizes.gate_up_columns, ACTIVATIONS[activation[0]],
        gate_up[1] is not None, has_pdl(), num_warps=sizes.num_warps, **options,
    )  # fmt: skip
    _down_pairs[(triton.cdiv(size, sizes.down_outputs), tokens)](
        h, down[0], out if down[1] is None else down[1], experts, weights, out, size, inner, top_k,
        sizes.down_outputs, sizes.down_columns, down[1] is not None, has_pdl(), num_warps=sizes.num_warps, **options,
    )  # fmt: skip
    return out


def _precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else "ieee"

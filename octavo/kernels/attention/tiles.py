"""What decode and prefill share: loading a tile of keys and values of one sequence from its pages."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.gpu.launch import settle_names

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)
"""A score that weighs nothing; finite, so that a row without any key does not become NaN."""


@triton.jit
def load_tile(
    cache, descriptor, table, start, first, end, kv_head,
    stride_block, stride_kv, stride_head,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys and values ``[TILE, D_PAD]`` of the tokens ``start .. start + TILE`` of one sequence.

    Rows at and after ``end`` hold finite rubbish: the caller masks their scores. Where TILE divides PAGE the tile lies
    in one page, so ``start`` is a multiple of TILE. Elsewhere it may begin in pages before that of ``first``, the first
    token that anybody sees: their blocks may be those of others by now, and hold anything. They are not read.
    """
    offs_d = tl.arange(0, D_PAD)
    if TMA:
        page = tl.load(table + start // PAGE)
        row = (page * 2 * G + kv_head) * PAGE + start % PAGE
        k = descriptor.load([row, 0])
        v = descriptor.load([row + G * PAGE, 0])
    else:
        tokens = start + tl.arange(0, TILE)
        if PAGE % TILE == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            rows = page * stride_block + (tokens % PAGE) * D
            # A slot that was never written may hold anything: read only what is there.
            mask = (tokens < end)[:, None]
        else:
            is_there = (tokens >= first) & (tokens < end)
            pages = tl.load(table + tokens // PAGE, mask=is_there, other=0).to(tl.int64)
            rows = pages * stride_block + (tokens % PAGE) * D
            mask = is_there[:, None]
        if D_PAD > D:
            mask = mask & (offs_d < D)[None, :]
        at = cache + rows[:, None] + kv_head * stride_head + offs_d[None, :]
        k = tl.load(at, mask=mask, other=0.0)
        v = tl.load(at + stride_kv, mask=mask, other=0.0)
    return k, v


@triton.jit
def soft_cap(scores, cap):
    """``cap * tanh(scores / cap)`` without overflow."""
    x = tl.minimum(tl.maximum(scores / cap, -15.0), 15.0)
    e = tl.exp2(x * (2.0 * LOG2E))
    return cap * (e - 1.0) / (e + 1.0)


@triton.jit
def add_sink(m, total, acc, sink):
    """One more score, in natural units, without a value; the running maximum ``m`` is in base 2. The three shapes
    broadcast with ``sink``'s. Returns ``total`` and ``acc`` as they are under the maximum of both."""
    score = sink.to(tl.float32) * LOG2E
    m_new = tl.maximum(m, score)
    shrink = tl.exp2(m - m_new)
    return total * shrink + tl.exp2(score - m_new), acc * shrink


settle_names(soft_cap, add_sink)


def make_descriptor(cache_NKGPD: Tensor, tile: int) -> TensorDescriptor:
    """A two-dimensional TMA view ``[N * 2 * G * P, D]`` of a layer's cache in boxes of ``[tile, D]``."""
    flat = cache_NKGPD.view(-1, cache_NKGPD.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [tile, flat.shape[-1]])


def can_use_tma(page: int, tile: int, head_dim: int, element_size: int) -> bool:
    """Whether a tile is one box of a page: Hopper wants rows of whole 16 bytes and power-of-two boxes of at most 256
    rows."""
    return page % tile == 0 and tile <= 256 and head_dim & (head_dim - 1) == 0 and head_dim <= 256 and element_size == 2


def fit_tile(tile: int, page: int) -> int:
    """The largest tile up to ``tile`` that divides a page, or ``tile`` itself when that would be below 32."""
    divisor = page & -page
    return min(tile, divisor) if divisor >= 32 else tile

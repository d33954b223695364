"""Paged prefill attention: tiles of queries over the paged history, this step's keys included.

A program handles one tile of queries of one request and one or more heads of a KV group as its rows. Tiles wholly
below the diagonal run without a mask. Papers: Dao, "FlashAttention-2", 2023; Kwon et al., SOSP 2023. Measured choices
(H200, 2026-11-22): docs/log.md; the load of the page id counts as a pipeline stage, so 5 stages hold 4 tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.tiles import (
    LOG2E,
    MASKED,
    add_sink,
    can_use_tma,
    fit_tile,
    load_tile,
    make_descriptor,
    soft_cap,
)
from octavo.kernels.gpu.launch import has_pdl, launch_options


@triton.jit
def _attend(
    acc, total, m, queries, cache, descriptor, table, low, high, first, end, positions, kv_head, scale, softcap,
    stride_block, stride_kv, stride_head,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys ``low .. high``, both multiples of TILE but for the end; nobody sees those before ``first``."""
    for start in tl.range(low, high, TILE, num_stages=STAGES):
        start = tl.multiple_of(start, TILE)
        k, v = load_tile(
            cache, descriptor, table, start, first, end, kv_head, stride_block, stride_kv, stride_head,
            G, D, D_PAD, PAGE, TILE, TMA,
        )  # fmt: skip
        k = k.to(queries.dtype)
        v = v.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
        if HAS_SOFTCAP:
            scores = soft_cap(scores * scale, softcap) * LOG2E
        else:
            scores = scores * (scale * LOG2E)
        if MASK:
            keys = start + tl.arange(0, TILE)
            seen = keys[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, MASKED)
            if TMA:
                v = tl.where((keys < end)[:, None], v, 0.0)
        m_new = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    return acc, total, m


@triton.jit
def _prefill(
    q, cache, descriptor, block_table, tiles, out, sinks,
    scale, softcap, q_stride_t, q_stride_h, out_stride_t, out_stride_h, table_stride, stride_block, stride_kv,
    stride_head,
    G: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    item = tiles + tl.program_id(1) * 4
    request = tl.load(item)
    first_token = tl.load(item + 1)
    num_tokens = tl.load(item + 2)
    first_position = tl.load(item + 3)
    first_head = tl.program_id(0) * PACK
    kv_head = first_head // GROUP
    rows = tl.arange(0, ROWS)
    row_token = rows // PACK
    offs_d = tl.arange(0, D_PAD)
    is_real = row_token < num_tokens
    mask = is_real[:, None] & (offs_d < D)[None, :]
    token = (first_token + row_token).to(tl.int64)
    head = first_head + rows % PACK
    queries = tl.load(q + (token * q_stride_t + head * q_stride_h)[:, None] + offs_d[None, :], mask=mask, other=0.0)
    positions = first_position + row_token
    end = first_position + tl.minimum(num_tokens, ROWS // PACK)
    table = block_table + request.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    m = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first_position - WINDOW + 1, 0)
        low = first // TILE * TILE
        # Keys seen by every row: from the last row's window to the first row's own key.
        all_low = tl.maximum((end - WINDOW + TILE - 1) // TILE * TILE, low)
        full = tl.maximum((first_position + 1) // TILE * TILE, low)
        all_low = tl.minimum(all_low, full)
        acc, total, m = _attend(
            acc, total, m, queries, cache, descriptor, table, low, all_low, first, end, positions, kv_head, scale,
            softcap, stride_block, stride_kv, stride_head, G, D, D_PAD, PAGE, TILE, TMA, True, WINDOW, HAS_SOFTCAP,
            PRECISION, STAGES,
        )  # fmt: skip
    else:
        all_low = 0
        full = (first_position + 1) // TILE * TILE
    acc, total, m = _attend(
        acc, total, m, queries, cache, descriptor, table, all_low, full, first, end, positions, kv_head, scale, softcap,
        stride_block, stride_kv, stride_head, G, D, D_PAD, PAGE, TILE, TMA, False, WINDOW, HAS_SOFTCAP, PRECISION,
        STAGES,
    )  # fmt: skip
    acc, total, m = _attend(
        acc, total, m, queries, cache, descriptor, table, full, end, first, end, positions, kv_head, scale, softcap,
        stride_block, stride_kv, stride_head, G, D, D_PAD, PAGE, TILE, TMA, True, WINDOW, HAS_SOFTCAP, PRECISION,
        STAGES,
    )  # fmt: skip
    if HAS_SINKS:
        column, acc = add_sink(m[:, None], total[:, None], acc, tl.load(sinks + head)[:, None])
        total = tl.sum(column, 1)
    at = out + (token * out_stride_t + head * out_stride_h)[:, None] + offs_d[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


class PrefillShape:
    """Tile sizes for one kind of layer: what the host must know to cut a step into tiles."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, page: int, element_size: int) -> None:
        """Choose the sizes.

        Args:
            num_heads: Query heads.
            num_kv_heads: KV heads.
            head_dim: Size of a head.
            page: Tokens per block.
            element_size: Bytes of an element of q and of the cache.
        """
        group = num_heads // num_kv_heads
        self.pack = group & -group
        """Query heads in the rows of one program: the largest power of two that divides the group."""
        if element_size == 2 and head_dim <= 128:
            large = page >= 128
            self.rows, self.tile, self.num_warps, self.stages = (128, 128, 8, 5) if large else (64, 64, 4, 5)
        else:
            self.rows, self.tile, self.num_warps, self.stages = 64, 32, 4, 3 if element_size == 2 else 2
        self.tile = fit_tile(self.tile, page)
        self.pack = min(self.pack, self.rows // 16)

    @property
    def tokens(self) -> int:
        """Queries in a tile."""
        return self.rows // self.pack

    def most_tiles(self, num_tokens: int, num_reqs: int) -> int:
        """Upper bound of the tiles of any step of so many tokens and requests."""
        return -(-num_tokens // self.tokens) + num_reqs

    def num_tiles(self, query_lens: Sequence[int]) -> int:
        """Tiles of a step. Requests with one query are the decode kernel's."""
        return sum(-(-length // self.tokens) for length in query_lens if length > 1)


@triton.jit(do_not_specialize=["num_reqs"])
def _tile_list(query_start_loc, seq_lens, tiles, num_reqs, TOKENS: tl.constexpr, B_PAD: tl.constexpr):
    request = tl.program_id(0)
    index = tl.arange(0, B_PAD)
    start = tl.load(query_start_loc + index, mask=index < num_reqs, other=0)
    end = tl.load(query_start_loc + index + 1, mask=index < num_reqs, other=0)
    counts = tl.where(end - start > 1, (end - start + TOKENS - 1) // TOKENS, 0)
    place = tl.sum(tl.where(index < request, counts, 0), 0)
    count = tl.sum(tl.where(index == request, counts, 0), 0)
    first = tl.load(query_start_loc + request)
    length = tl.load(query_start_loc + request + 1) - first
    history = tl.load(seq_lens + request) - length
    for low in range(0, count, 128):
        number = low + tl.arange(0, 128)
        # The last tile sees most keys: it begins first, so that it is not left over at the end.
        token = (count - 1 - number) * TOKENS
        mask = number < count
        at = tiles + (place + number) * 4
        tl.store(at, tl.zeros_like(number) + request, mask=mask)
        tl.store(at + 1, first + token, mask=mask)
        tl.store(at + 2, length - token, mask=mask)
        tl.store(at + 3, history + token, mask=mask)


def make_tile_list(
    query_start_loc: Tensor, seq_lens: Tensor, shape: PrefillShape, num_tiles: int, *, is_bound: bool = False
) -> Tensor:
    """``[num_tiles, 4]`` int32: request, first token of the step, tokens up to its end, position of the first.

    Made on the device, so that no step waits for pinned memory. One launch.

    Args:
        query_start_loc: ``[B + 1]`` int32.
        seq_lens: ``[B]`` int32, the queries included.
        shape: Tile sizes.
        num_tiles: ``shape.num_tiles`` of the step, or with ``is_bound`` anything above it.
        is_bound: Tiles behind the last one get no tokens, at the cost of a second launch.
    """
    allocate = torch.zeros if is_bound else torch.empty
    tiles = allocate((num_tiles, 4), dtype=torch.int32, device=seq_lens.device)
    num_reqs = len(seq_lens)
    b_pad = max(16, triton.next_power_of_2(num_reqs))
    _tile_list[(num_reqs,)](query_start_loc, seq_lens, tiles, num_reqs, shape.tokens, b_pad, num_warps=4)
    return tiles


def prefill_attention(
    q_THD: Tensor, cache_NKGPD: Tensor, block_table: Tensor, tiles: Tensor, shape: PrefillShape, out_THD: Tensor,
    *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Causal attention of the tokens in ``tiles``; the others of ``out_THD`` are left alone.

    Args:
        q_THD: ``[T, H, D]``, last dimension contiguous.
        cache_NKGPD: ``[N, 2, G, P, D]``, this step's keys and values written.
        block_table: ``[B, max_blocks]`` int32.
        tiles: ``[num_tiles, 4]`` int32 from ``make_tile_list``.
        shape: Tile sizes.
        out_THD: As ``q_THD``; written.
        scale: Multiplies the products.
        window: Keys that a query sees, itself included.
        softcap: Bound of the scores.
        sinks: ``[H]``: a score of each head that takes part in the softmax and has no value.

    Cost: one launch. Reference: ``paged_attention_ref`` in ``reference.py``.
    """
    num_heads, size = q_THD.shape[1:]
    kv_heads, page = cache_NKGPD.shape[2], cache_NKGPD.shape[3]
    is_half = q_THD.element_size() == 2
    use_tma = can_use_tma(page, shape.tile, size, cache_NKGPD.element_size())
    _prefill[(num_heads // shape.pack, len(tiles))](
        q_THD, cache_NKGPD, make_descriptor(cache_NKGPD, shape.tile) if use_tma else cache_NKGPD, block_table, tiles,
        out_THD, out_THD if sinks is None else sinks, scale, softcap or 0.0, q_THD.stride(0), q_THD.stride(1),
        out_THD.stride(0), out_THD.stride(1), block_table.stride(0), *cache_NKGPD.stride()[:3],
        kv_heads, num_heads // kv_heads, shape.pack, shape.rows, size, triton.next_power_of_2(size), page, shape.tile,
        use_tma, window or 0, softcap is not None, sinks is not None, "tf32" if is_half else "ieee", shape.stages,
        has_pdl(), num_warps=shape.num_warps, **launch_options(),
    )  # fmt: skip

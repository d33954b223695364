"""Paged decode attention: one query a request, its history cut into equal parts, parts combined.

The parts are chosen on the device from the true lengths (``make_work_list``), once a step for all layers, so that a
captured graph serves any mixture of lengths. A program handles one part and one KV head with all its query heads as
rows. Papers: Dao et al., "Flash-Decoding", 2023; Kwon et al., SOSP 2023. Measured choices: docs/log.md.
"""

from __future__ import annotations

from dataclasses import dataclass

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

ITEM_FIELDS = 8
"""Of a work item: request, query token, first and end key, partial slot (-1 = alone), length, two unused."""
MIN_PART_TOKENS = 128
PROGRAMS_PER_SM = 4
_CLASSES = 16
"""Of length, in which parts are ordered."""


@dataclass(slots=True)
class WorkList:
    """Parts of a step's histories, on the device."""

    items: Tensor
    """[max_items, ITEM_FIELDS] int32."""
    num_items: Tensor
    """[1] int32."""
    first_slot: Tensor
    """[B] int32, where a request's partial results begin."""
    num_parts: Tensor
    """[B] int32; 0 = not a decode, 1 = written directly."""
    split: Tensor
    """[S, 2] int32: request and query token of those in more than one part, -1 behind the last."""
    max_items: int
    tile: int
    """Key tokens a program loads at a time; parts begin at its multiples."""
    is_early: bool = True
    """Whether a kernel may read it, and the block tables, before the kernels in front are done: a kernel that is not
    launched early lies between."""


@triton.jit(do_not_specialize=["num_reqs", "target_items", "max_split"])
def _work_list(
    query_start_loc, seq_lens, items, num_items, first_slot, num_parts, split, num_reqs, target_items, max_split,
    WINDOW: tl.constexpr, TILE: tl.constexpr, MIN_PART: tl.constexpr, FIELDS: tl.constexpr, B_PAD: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, B_PAD)
    is_real = index < num_reqs
    start = tl.load(query_start_loc + index, mask=is_real, other=0)
    end = tl.load(query_start_loc + index + 1, mask=is_real, other=0)
    length = tl.load(seq_lens + index, mask=is_real, other=0)
    is_decode = (end - start == 1) & (length > 0)
    first_key = tl.zeros_like(length)
    if WINDOW > 0:
        first_key = tl.maximum(length - WINDOW, 0) // TILE * TILE
    keys = tl.where(is_decode, length - first_key, 0)
    total = tl.sum(keys.to(tl.int64), 0)
    part = tl.maximum(MIN_PART, (total + target_items - 1) // target_items).to(tl.int32)
    parts = tl.maximum(1, (keys + part // 2) // part)
    part_len = ((keys + parts - 1) // parts + TILE - 1) // TILE * TILE
    parts = tl.where(is_decode, (keys + part_len - 1) // tl.maximum(part_len, 1), 0)
    # Long ones first: a program that begins late should be a short one, since the next kernel waits for the last.
    # Lengths in CLASSES steps are order enough.
    longest = tl.maximum(tl.max(tl.where(is_decode, part_len, 0), 0), 1)
    length_class = CLASSES - 1 - (part_len.to(tl.int64) * (CLASSES - 1) // longest).to(tl.int32)
    item = tl.zeros_like(parts)
    num_placed = 0
    for current in range(CLASSES):
        count = tl.where(length_class == current, parts, 0)
        item = tl.where(length_class == current, num_placed + tl.cumsum(count, 0) - count, item)
        num_placed += tl.sum(count, 0)
    slots = tl.where(parts > 1, parts, 0)
    slot = tl.cumsum(slots, 0) - slots
    is_split = (parts > 1).to(tl.int32)
    place = tl.cumsum(is_split, 0) - is_split
    tl.store(split + place * 2, index, mask=parts > 1)
    tl.store(split + place * 2 + 1, start, mask=parts > 1)
    num_split = tl.sum(is_split, 0)
    for behind in range(num_split, max_split, 128):
        rest = behind + tl.arange(0, 128)
        tl.store(split + rest * 2, tl.full([128], -1, tl.int32), mask=rest < max_split)
    tl.store(num_parts + index, parts, mask=is_real)
    tl.store(first_slot + index, slot, mask=is_real)
    tl.store(num_items, tl.sum(parts, 0))
    for p in range(tl.max(parts, 0)):
        mask = p < parts
        at = items + (item + p) * FIELDS
        low = first_key + p * part_len
        tl.store(at, index, mask=mask)
        tl.store(at + 1, start, mask=mask)
        tl.store(at + 2, low, mask=mask)
        tl.store(at + 3, tl.minimum(low + part_len, length), mask=mask)
        tl.store(at + 4, tl.where(parts > 1, slot + p, -1), mask=mask)
        tl.store(at + 5, length, mask=mask)


def make_work_list(
    query_start_loc: Tensor, seq_lens: Tensor, num_kv_heads: int, num_sms: int, tile: int, window: int | None
) -> WorkList:
    """Cut the histories of all requests with one query into parts of about equal length.

    So many parts that ``PROGRAMS_PER_SM`` programs on each multiprocessor have one, none under ``MIN_PART_TOKENS``; the
    longer ones come first.
    No host synchronisation; one launch.

    Args:
        query_start_loc: ``[B + 1]`` int32.
        seq_lens: ``[B]`` int32, the query included.
        num_kv_heads: Programs per part.
        num_sms: Multiprocessors of the device.
        tile: Parts begin at multiples of it.
        window: Keys that a query sees.
    """
    num_reqs = len(seq_lens)
    target = max(1, PROGRAMS_PER_SM * num_sms // num_kv_heads)
    max_items = 2 * num_reqs + target + 1
    # A request is cut only where it has more than 1.5 parts' keys, and all keys are at most ``target`` parts.
    max_split = min(num_reqs, target)
    device = seq_lens.device
    work = WorkList(
        items=torch.empty((max_items, ITEM_FIELDS), dtype=torch.int32, device=device),
        num_items=torch.empty(1, dtype=torch.int32, device=device),
        first_slot=torch.empty(num_reqs, dtype=torch.int32, device=device),
        num_parts=torch.empty(num_reqs, dtype=torch.int32, device=device),
        split=torch.empty((max_split, 2), dtype=torch.int32, device=device),
        max_items=max_items,
        tile=tile,
    )
    b_pad = max(16, triton.next_power_of_2(num_reqs))
    _work_list[(1,)](
        query_start_loc, seq_lens, work.items, work.num_items, work.first_slot, work.num_parts, work.split,
        num_reqs, target, max_split, window or 0, tile, MIN_PART_TOKENS, ITEM_FIELDS, b_pad, _CLASSES, num_warps=4,
    )  # fmt: skip
    return work


@triton.jit
def _decode(
    q, cache, descriptor, block_table, items, num_items, out, partial, partial_lse, sinks,
    scale, softcap, q_stride_t, q_stride_h, out_stride_t, out_stride_h, table_stride, stride_block, stride_kv,
    stride_head,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, FIELDS: tl.constexpr,
    PDL: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not IS_EARLY:
            tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0) % G
    index = tl.program_id(0) // G
    if index >= tl.load(num_items):
        if IS_EARLY:
            tl.extra.cuda.gdc_wait()
        return
    item = items + index * FIELDS
    request = tl.load(item)
    token = tl.load(item + 1).to(tl.int64)
    low = tl.load(item + 2)
    high = tl.load(item + 3)
    slot = tl.load(item + 4)
    length = tl.load(item + 5)
    table = block_table + request.to(tl.int64) * table_stride
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    q_mask = (rows < GROUP)[:, None] & (offs_d < D)[None, :]
    heads = kv_head * GROUP + rows
    queries = tl.load(q + token * q_stride_t + heads[:, None] * q_stride_h + offs_d[None, :], mask=q_mask, other=0.0)
    m = tl.full([ROWS, 1], MASKED, tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    for start in tl.range(low, high, TILE, num_stages=STAGES):
        start = tl.multiple_of(start, TILE)
        k, v = load_tile(
            cache, descriptor, table, start, first, high, kv_head, stride_block, stride_kv, stride_head,
            G, D, D_PAD, PAGE, TILE, TMA,
        )  # fmt: skip
        k = k.to(queries.dtype)
        v = v.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = soft_cap(scores, softcap)
        scores = scores * LOG2E
        keys = start + tl.arange(0, TILE)
        seen = keys < high
        if TMA:
            # Rows after the end may be memory that was never written: 0 * NaN would spoil the sum.
            v = tl.where(seen[:, None], v, 0.0)
        scores = tl.where(seen[None, :], scores, MASKED)
        if WINDOW > 0:
            # The first part begins at a multiple of TILE, which may lie before the window.
            scores = tl.where((keys >= length - WINDOW)[None, :], scores, MASKED)
        m_new = tl.maximum(m, tl.max(scores, 1)[:, None])
        shrink = tl.exp2(m - m_new)
        weights = tl.exp2(scores - m_new)
        total = total * shrink + tl.sum(weights, 1)[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
        m = m_new
    if HAS_SINKS:
        # A history in parts gets its sink when the parts are combined.
        if slot < 0:
            sink = tl.load(sinks + heads, mask=rows < GROUP, other=MASKED)[:, None]
            total, acc = add_sink(m, total, acc, sink)
    result = acc / total
    if slot < 0:
        at = out + token * out_stride_t + heads[:, None] * out_stride_h + offs_d[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=q_mask)
    else:
        row = slot.to(tl.int64) * (G * GROUP) + heads
        tl.store(partial + row[:, None] * D + offs_d[None, :], result, mask=q_mask)
        tl.store(partial_lse + row[:, None], m + tl.log2(total), mask=(rows < GROUP)[:, None])


@triton.jit
def _combine(
    partial, partial_lse, first_slot, num_parts, split, out, sinks, out_stride_t, out_stride_h,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not IS_EARLY:
            tl.extra.cuda.gdc_wait()
    entry = split + tl.program_id(0) * 2
    request = tl.load(entry)
    token = tl.load(entry + 1).to(tl.int64)
    head = tl.program_id(1)
    is_split = request >= 0
    parts = tl.load(num_parts + request, mask=is_split, other=0)
    base = tl.load(first_slot + request, mask=is_split, other=0).to(tl.int64)
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
    if is_split:
        offs_d = tl.arange(0, D_PAD)
        m = tl.full([1], MASKED, tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([D_PAD], tl.float32)
        for start in range(0, parts, PARTS):
            index = start + tl.arange(0, PARTS)
            row = (base + index) * H + head
            lse = tl.load(partial_lse + row, mask=index < parts, other=MASKED)
            m_new = tl.maximum(m, tl.max(lse, 0))
            weight = tl.exp2(lse - m_new)
            shrink = tl.exp2(m - m_new)
            values = tl.load(
                partial + row[:, None] * D + offs_d[None, :],
                mask=(index < parts)[:, None] & (offs_d < D)[None, :],
                other=0.0,
            )
            acc = acc * shrink + tl.sum(values * weight[:, None], 0)
            total = total * shrink + tl.sum(weight, 0)
            m = m_new
        if HAS_SINKS:
            total, acc = add_sink(m, total, acc, tl.load(sinks + head))
        at = out + token * out_stride_t + head * out_stride_h + offs_d
        tl.store(at, (acc / total).to(out.dtype.element_ty), mask=offs_d < D)


def decode_attention(
    q_THD: Tensor, cache_NKGPD: Tensor, block_table: Tensor, work: WorkList, out_THD: Tensor, *,
    scale: float, window: int | None, softcap: float | None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of the requests with one query; the other tokens of ``out_THD`` are left alone.

    Args:
        q_THD: ``[T, H, D]``, last dimension contiguous.
        cache_NKGPD: ``[N, 2, G, P, D]``, this step's keys and values written.
        block_table: ``[B, max_blocks]`` int32.
        work: From ``make_work_list`` for this step.
        out_THD: As ``q_THD``; written.
        scale: Multiplies the products.
        window: Keys that a query sees, itself included.
        softcap: Bound of the scores.
        sinks: ``[H]``: a score of each head that takes part in the softmax and has no value.

    With ``work.is_early`` all but queries, keys and values is read before the kernels in front are done.

    Cost: two launches; reads each key and value once. Reference: ``paged_attention_ref`` in ``reference.py``.
    """
    num_heads, size = q_THD.shape[1:]
    kv_heads, page = cache_NKGPD.shape[2], cache_NKGPD.shape[3]
    group = num_heads // kv_heads
    tile = work.tile
    is_half = q_THD.element_size() == 2
    use_tma = can_use_tma(page, tile, size, cache_NKGPD.element_size())
    d_pad = triton.next_power_of_2(size)
    partial = torch.empty((work.max_items, num_heads, size), dtype=torch.float32, device=q_THD.device)
    partial_lse = torch.empty((work.max_items, num_heads), dtype=torch.float32, device=q_THD.device)
    num_warps, stages = _settings(tile, size, is_half)
    is_early = work.is_early and has_pdl()
    _decode[(work.max_items * kv_heads,)](
        q_THD, cache_NKGPD, make_descriptor(cache_NKGPD, tile) if use_tma else cache_NKGPD, block_table, work.items,
        work.num_items, out_THD, partial, partial_lse, out_THD if sinks is None else sinks, scale, softcap or 0.0,
        q_THD.stride(0), q_THD.stride(1), out_THD.stride(0), out_THD.stride(1), block_table.stride(0),
        *cache_NKGPD.stride()[:3],
        kv_heads, group, max(16, triton.next_power_of_2(group)), size, d_pad, page, tile, use_tma, window or 0,
        softcap is not None, sinks is not None, "tf32" if is_half else "ieee", stages, ITEM_FIELDS, has_pdl(),
        is_early, num_warps=num_warps, **launch_options(),
    )  # fmt: skip
    _combine[(len(work.split), num_heads)](
        partial, partial_lse, work.first_slot, work.num_parts, work.split, out_THD,
        out_THD if sinks is None else sinks, out_THD.stride(0), out_THD.stride(1), num_heads, size, d_pad, 16,
        sinks is not None, has_pdl(), is_early, num_warps=1, **launch_options(),
    )  # fmt: skip


def decode_tile(page: int, num_reqs: int, head_dim: int) -> int:
    """Key tokens a program loads at a time: 32 suits many or short histories, 64 few long ones (H200, 2026-11-22)."""
    tile = 32 if num_reqs >= 32 or head_dim > 128 else 64
    return fit_tile(tile, page)


def _settings(tile: int, head_dim: int, is_half: bool) -> tuple[int, int]:
    """Warps and pipeline stages. Stages count the load of the page id, so two fewer tiles are in flight."""
    if not is_half:
        return 4, 2
    if head_dim > 128:
        return 4, 3
    return (2, 5) if tile <= 32 else (4, 4)

"""Paged decode attention of few requests in one launch, from the projection on: what counts is how often a program
waits for memory, not how much it reads.

A program takes one part of one request's history and one KV head with all its query heads. Lengths, tables and the keys
and values of earlier steps are there before the layer begins, so a program has its first tile in registers before the
projection of this step's queries is done (early launch; see ``gpu/launch.py``). It normalises and rotates its queries
itself; who has the last part does so with the new key, writes it and the value to the cache, and sees them without
reading them back. A history in several parts is put together by whoever comes last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.tiles import LOG2E, MASKED, add_sink, soft_cap
from octavo.kernels.gpu.launch import MAX_ARRIVALS, arrivals, has_pdl, launch_options
from octavo.kernels.gpu.rope import norm_rotate, rotation

_MAX_REQUESTS = 4
"""More are served faster by ``decode.py`` (H200, 2026-11-23: 8 requests of 512 tokens, 16.6 us here, 14.1 there)."""
_MAX_GROUP = 1024
"""Numbers of a group's queries, which whoever adds up has in registers for all parts: 8 heads of 128."""
_MAX_PARTS = 16
_PROGRAMS = 256
"""Two for each multiprocessor, so that all run at once."""


@triton.jit
def _load(
    cache, table, start, first, end, kv_head, stride_block, stride_kv, stride_head, stride_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values ``[TILE, D_PAD]`` of the tokens from ``start``; 0 before ``first``, where the table may name
    blocks of others, and from ``end`` on."""
    tokens = start + tl.arange(0, TILE)
    offs_d = tl.arange(0, D_PAD)
    is_there = (tokens >= first) & (tokens < end)
    pages = tl.load(table + tokens // PAGE, mask=is_there, other=0).to(tl.int64)
    rows = pages * stride_block + kv_head * stride_head + (tokens % PAGE) * stride_slot
    at = cache + rows[:, None] + offs_d[None, :]
    mask = is_there[:, None] & (offs_d < D)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + stride_kv, mask=mask, other=0.0)


@triton.jit
def _see(
    queries, k, v, start, first, end, scale, softcap, m, total, acc,
    TILE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile more in the running softmax."""
    scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        scores = soft_cap(scores, softcap)
    keys = start + tl.arange(0, TILE)
    scores = tl.where(((keys >= first) & (keys < end))[None, :], scores * LOG2E, MASKED)
    m_new = tl.maximum(m, tl.max(scores, 1)[:, None])
    shrink = tl.exp2(m - m_new)
    weights = tl.exp2(scores - m_new)
    total = total * shrink + tl.sum(weights, 1)[:, None]
    acc = tl.dot(weights.to(queries.dtype), v.to(queries.dtype), acc * shrink, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit(do_not_specialize=["most_parts"], do_not_specialize_on_alignment=["positions", "slots"])
def _decode_few(
    qkv, cache, block_table, seq_lens, positions, slots, rotations, q_weight, k_weight, out, partial, partial_lse,
    sinks, counts,
    most_parts, scale, softcap, eps, stride_token, out_stride_t, out_stride_h, table_stride, stride_block, stride_kv,
    stride_head, stride_slot,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    WINDOW: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) % G
    part = tl.program_id(0) // G
    request = tl.program_id(1).to(tl.int64)
    group: tl.constexpr = H // G
    dtype: tl.constexpr = qkv.dtype.element_ty
    length = tl.load(seq_lens + request)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    base = first // TILE * TILE
    part_len = tl.cdiv(length - base, TILE * most_parts) * TILE
    low = base + part * part_len
    if low >= length:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    parts = tl.cdiv(length - base, part_len)
    is_last = part == parts - 1
    # The new key is not in the cache yet.
    end = tl.minimum(low + part_len, length - 1)
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    heads = kv_head * group + rows
    row_mask = (rows < group)[:, None]
    d_mask = (offs_d < D)[None, :]
    table = block_table + request * table_stride
    cos, sin = rotation(rotations, tl.load(positions + request), D_PAD, HALF)
    place = tl.load(slots + request)
    wq = tl.zeros([1, D_PAD], q_weight.dtype.element_ty)
    wk = wq
    if HAS_NORM:
        wq = tl.load(q_weight + offs_d, mask=offs_d < D, other=0.0)[None, :]
        wk = tl.load(k_weight + offs_d, mask=offs_d < D, other=0.0)[None, :]
    k, v = _load(
        cache, table, low, first, end, kv_head, stride_block, stride_kv, stride_head, stride_slot, D, D_PAD, PAGE, TILE
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = qkv + request * stride_token
    q = tl.load(at + heads[:, None] * D + offs_d[None, :], mask=row_mask & d_mask, other=0.0)
    own = at + (H + kv_head) * D + offs_d[None, :]
    k_row = tl.load(own, mask=d_mask, other=0.0)
    v_row = tl.load(own + G * D, mask=d_mask, other=0.0).to(cache.dtype.element_ty)
    queries = norm_rotate(q.to(tl.float32), wq, cos, sin, eps, D, D_PAD, ROWS, HAS_NORM, dtype).to(dtype)
    m = tl.full([ROWS, 1], MASKED, tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    if is_last:
        turned = norm_rotate(k_row.to(tl.float32), wk, cos, sin, eps, D, D_PAD, 1, HAS_NORM, dtype)
        k_row = turned.to(dtype).to(cache.dtype.element_ty)
        to = cache + (place // PAGE) * stride_block + kv_head * stride_head + (place % PAGE) * stride_slot
        is_kept = d_mask & (place >= 0)
        tl.store(to + offs_d[None, :], k_row, mask=is_kept)
        tl.store(to + stride_kv + offs_d[None, :], v_row, mask=is_kept)
        own_score = tl.sum(queries.to(tl.float32) * k_row.to(tl.float32), 1)[:, None] * scale
        if HAS_SOFTCAP:
            own_score = soft_cap(own_score, softcap)
        m = own_score * LOG2E
        total += 1.0
        acc += v_row.to(tl.float32)
    m, total, acc = _see(queries, k, v, low, first, end, scale, softcap, m, total, acc, TILE, HAS_SOFTCAP, PRECISION)
    for start in tl.range(low + TILE, end, TILE, num_stages=1):
        k, v = _load(
            cache, table, start, first, end, kv_head, stride_block, stride_kv, stride_head, stride_slot,
            D, D_PAD, PAGE, TILE,
        )  # fmt: skip
        m, total, acc = _see(
            queries, k, v, start, first, end, scale, softcap, m, total, acc, TILE, HAS_SOFTCAP, PRECISION
        )
    to_out = out + request * out_stride_t
    if parts == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=rows < group, other=MASKED)[:, None]
            total, acc = add_sink(m, total, acc, sink)
        result = (acc / total).to(out.dtype.element_ty)
        tl.store(to_out + heads[:, None] * out_stride_h + offs_d[None, :], result, mask=row_mask & d_mask)
    else:
        slot = ((request * PARTS + part) * H + heads)[:, None]
        tl.store(partial + slot * D + offs_d[None, :], acc / total, mask=row_mask & d_mask)
        tl.store(partial_lse + slot, m + tl.log2(total), mask=row_mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counts + request * G + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.debug_barrier()
            tl.store(counts + request * G + kv_head, 0)
            index = tl.arange(0, PARTS)[:, None]
            both = tl.arange(0, GROUP_PAD * D_PAD)[None, :]
            head, dim = both // D_PAD, both % D_PAD
            is_real = (head < group) & (dim < D)
            which = (request * PARTS + index) * H + kv_head * group + head
            lse = tl.load(partial_lse + which, mask=(index < parts) & is_real, other=MASKED, cache_modifier=".cg")
            values = tl.load(partial + which * D + dim, mask=(index < parts) & is_real, other=0.0, cache_modifier=".cg")
            most = tl.max(lse, 0)[None, :]
            weight = tl.where(index < parts, tl.exp2(lse - most), 0.0)
            whole = tl.sum(weight, 0)[None, :]
            summed = tl.sum(weight * values, 0)[None, :]
            if HAS_SINKS:
                sink = tl.load(sinks + kv_head * group + head, mask=is_real, other=MASKED)
                whole, summed = add_sink(most, whole, summed, sink)
            at_out = to_out + (kv_head * group + head) * out_stride_h + dim
            tl.store(at_out, (summed / whole).to(out.dtype.element_ty), mask=is_real)


def suits(num_reqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether decodes of so many requests are faster so than by ``decode.py``."""
    group = triton.next_power_of_2(num_heads // num_kv_heads) * triton.next_power_of_2(head_dim)
    return num_reqs <= _MAX_REQUESTS and num_reqs * num_kv_heads <= MAX_ARRIVALS and group <= _MAX_GROUP


def decode_few(
    qkv: Tensor, cache_NKGPD: Tensor, block_table: Tensor, seq_lens: Tensor, out_THD: Tensor, *,
    norms: tuple[Tensor, Tensor, float] | None, table: Tensor, positions: Tensor, slot_mapping: Tensor, scale: float,
    window: int | None, softcap: float | None, sinks: Tensor | None = None, parts: int | None = None,
) -> None:  # fmt: skip
    """Norm, rotation, write to the cache and attention of requests with one query each. One launch.

    Args:
        qkv: ``[B, (H + 2G) * D]``, rows contiguous: what the projection left of each request.
        cache_NKGPD: ``[N, 2, G, P, D]``; written at ``slot_mapping``.
        block_table: ``[B, max_blocks]`` int32.
        seq_lens: ``[B]`` int32, the query included; 0 for a request that is none.
        out_THD: ``[B, H, D]``; written.
        norms: As ``norm_rotate_write_ref`` has it.
        table: ``[max_positions, R / 2, 2]`` float32 rotations.
        positions: ``[B]`` int64 rows of the table.
        slot_mapping: ``[B]`` int64; -1 writes nothing to the cache.
        scale: Multiplies the products.
        window: Keys that a query sees, itself included.
        softcap: Bound of the scores.
        sinks: ``[H]``: a score of each head that takes part in the softmax and has no value.
        parts: Most parts of one history, up to 16; chosen when not given.

    Everything but ``qkv`` is read before the kernels in front are done: it was complete when the last kernel that was
    not launched early began. The embedding of a step is one. Reference: ``norm_rotate_write_ref``, then
    ``paged_attention_ref``.
    """
    num_heads, size = out_THD.shape[1:]
    requests, kv_heads, page = len(qkv), cache_NKGPD.shape[2], cache_NKGPD.shape[3]
    assert requests * kv_heads <= MAX_ARRIVALS, "see suits()"
    group, d_pad = num_heads // kv_heads, triton.next_power_of_2(size)
    # Keys and values of a tile are in registers: 512 bytes of each thread.
    tile = max(16, min(128, 128 * 128 * 2 // (d_pad * cache_NKGPD.element_size())))
    parts = parts or max(1, min(_MAX_PARTS, _PROGRAMS // (kv_heads * requests)))
    partial = torch.empty((requests * _MAX_PARTS, num_heads, size), dtype=torch.float32, device=qkv.device)
    partial_lse = torch.empty((requests * _MAX_PARTS, num_heads), dtype=torch.float32, device=qkv.device)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    _decode_few[(kv_heads * parts, requests)](
        qkv, cache_NKGPD, block_table, seq_lens, positions, slot_mapping, table, q_weight, k_weight,
        out_THD, partial, partial_lse, out_THD if sinks is None else sinks, arrivals(qkv.device),
        parts, scale, softcap or 0.0, eps, qkv.stride(0), out_THD.stride(0), out_THD.stride(1), block_table.stride(0),
        *cache_NKGPD.stride()[:4],
        num_heads, kv_heads, max(16, triton.next_power_of_2(group)), triton.next_power_of_2(group), size, d_pad,
        table.shape[1], page, tile, _MAX_PARTS, window or 0, norms is not None, softcap is not None, sinks is not None,
        "tf32" if qkv.element_size() == 2 else "ieee", has_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip

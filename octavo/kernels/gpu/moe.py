"""Around the products of a mixture of experts: the router, the sorting of its choices, the sum over a token's experts.

One launch each, no host synchronisation, the same result in every run: nothing depends on the order of atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options
from octavo.kernels.moe.align import Tiles, max_tiles
from octavo.kernels.moe.routing import Routing, Scoring

_MAX_CHUNK = 1024


@triton.jit
def _best(values, index, SIZE: tl.constexpr):
    """The largest of ``[N]`` values and its place, the lowest among equals; always a place below SIZE."""
    top = tl.max(values, 0)
    place = tl.min(tl.where(values == top, index, SIZE - 1), 0)
    return top, place


@triton.jit
def _route(
    logits, correction, weights, experts, stride, scale,
    X: tl.constexpr, X_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_OF_TWO: tl.constexpr, IS_SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: X is small, and choosing needs all of its row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, X_PAD)
    is_expert = index < X
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits + row * stride + index, mask=is_expert, other=float("-inf")).to(tl.float32)
    # NaN compares with nothing: it would leave a token without an expert and the next kernel without a place to read.
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -1.0e30), 1.0e30), -1.0e30)
    if IS_SIGMOID:
        scores = tl.where(is_expert, tl.sigmoid(x), 0.0)
    else:
        e = tl.exp(x - tl.max(x, 0))
        e = tl.where(is_expert, e, 0.0)
        scores = e / tl.sum(e, 0)
    choice = scores
    if HAS_CORRECTION:
        choice += tl.load(correction + index, mask=is_expert, other=0.0).to(tl.float32)
    choice = tl.where(is_expert, choice, float("-inf"))
    if GROUPS > 1:
        size: tl.constexpr = X // GROUPS
        group = index // size
        # The score of each expert's group, where each expert stands.
        judged = tl.full([X_PAD], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            mine = (group == g) & is_expert
            values = tl.where(mine, choice, float("-inf"))
            top, place = _best(values, index, X)
            if GROUP_OF_TWO:
                second, _ = _best(tl.where(index == place, float("-inf"), values), index, X)
                top += second
            judged = tl.where(mine, top, judged)
        kept = index < 0
        for _ in tl.static_range(TOP_GROUPS):
            _, place = _best(tl.where(kept, float("-inf"), judged), index, X)
            kept = kept | (group == place // size)
        choice = tl.where(kept & is_expert, choice, float("-inf"))
    slot = tl.arange(0, K_PAD)
    chosen = tl.zeros([K_PAD], tl.int32)
    weight = tl.zeros([K_PAD], tl.float32)
    for k in tl.static_range(K):
        _, place = _best(choice, index, X)
        chosen = tl.where(slot == k, place, chosen)
        weight = tl.where(slot == k, tl.sum(tl.where(index == place, scores, 0.0), 0), weight)
        choice = tl.where(index == place, float("-inf"), choice)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(weights + row * K + slot, weight * scale, mask=slot < K)
    tl.store(experts + row * K + slot, chosen, mask=slot < K)


def route(logits: Tensor, rule: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``kernels.moe.routing.route_ref`` but for sparsemixer; ``logits [T, X]`` with contiguous rows."""
    assert rule.scoring is not Scoring.SPARSEMIXER
    tokens, num_experts = logits.shape
    weights = torch.empty((tokens, rule.top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, rule.top_k), dtype=torch.int32, device=logits.device)
    _route[(tokens,)](
        logits, weights if correction is None else correction, weights, experts, logits.stride(0), rule.scale,
        num_experts, triton.next_power_of_2(num_experts), rule.top_k, triton.next_power_of_2(rule.top_k),
        rule.num_groups, rule.top_groups, rule.is_group_of_two, rule.scoring is Scoring.SIGMOID, rule.is_normalised,
        correction is not None, has_pdl(), num_warps=1 if num_experts <= 256 else 4, **launch_options(),
    )  # fmt: skip
    return weights, experts


@triton.jit(do_not_specialize=["num_pairs", "limit"])
def _align(
    experts, pairs, owners, num_pairs, limit,
    X: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e places the pairs of expert e; the last one marks the tiles that nobody has.

    Each counts all pairs for itself: they are few thousand numbers in the cache, and one launch is spared.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    offs = tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        # What lies beyond the end is counted where no expert is.
        chosen = tl.load(experts + start + offs, mask=start + offs < num_pairs, other=BINS - 1)
        counts += tl.histogram(chosen, BINS)
    tiles = tl.where(bins < X, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(bins < expert, tiles, 0), 0)
    mine = tl.sum(tl.where((bins == expert) & (bins < X), tiles, 0), 0)
    if expert == X:
        for start in range(first, limit, CHUNK):
            tl.store(owners + start + offs, -1, mask=start + offs < limit)
    else:
        for start in range(0, mine, CHUNK):
            tl.store(owners + first + start + offs, expert, mask=start + offs < mine)
        place = first * ROWS
        for start in range(0, num_pairs, CHUNK):
            chosen = tl.load(experts + start + offs, mask=start + offs < num_pairs, other=BINS - 1)
            is_mine = chosen == expert
            rank = tl.cumsum(is_mine.to(tl.int32), 0)
            tl.store(pairs + place + rank - 1, start + offs, mask=is_mine)
            place += tl.max(rank, 0)
        end = (first + mine) * ROWS
        for start in range(place, end, CHUNK):
            tl.store(pairs + start + offs, num_pairs, mask=start + offs < end)


def align(experts: Tensor, num_experts: int, rows: int) -> Tiles:
    """As ``kernels.moe.align.align_ref``, in one launch; ``experts [T, K]`` int32, contiguous."""
    num_pairs = experts.numel()
    limit = max_tiles(num_pairs, num_experts, rows)
    pairs = torch.empty(limit * rows, dtype=torch.int32, device=experts.device)
    owners = torch.empty(limit, dtype=torch.int32, device=experts.device)
    chunk = min(_MAX_CHUNK, max(128, triton.next_power_of_2(num_pairs)))
    _align[(num_experts + 1,)](
        experts, pairs, owners, num_pairs, limit, num_experts, triton.next_power_of_2(num_experts + 1), rows, chunk,
        has_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip
    return Tiles(pairs, owners)


@triton.jit
def _combine(parts, weights, out, SIZE, K: tl.constexpr, BLOCK: tl.constexpr, WEIGH: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        part = tl.load(parts + (row * K + k) * SIZE + offs, mask=mask, other=0.0).to(tl.float32)
        if WEIGH:
            part *= tl.load(weights + row * K + k)
        total += part
    tl.store(out + row * SIZE + offs, total.to(out.dtype.element_ty), mask=mask)


def combine(parts: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """Sum ``parts [T * K, E]``, contiguous, over each token's K experts, times ``weights [T, K]`` if given: ``[T, E]``.

    Summed in float32 in the order of k. Reference: ``kernels.moe.experts.combine_ref``.
    """
    tokens, size = len(parts) // top_k, parts.shape[1]
    out = torch.empty((tokens, size), dtype=parts.dtype, device=parts.device)
    block = min(1024, triton.next_power_of_2(size))
    _combine[(tokens, triton.cdiv(size, block))](
        parts, parts if weights is None else weights, out, size, top_k, block, weights is not None, has_pdl(),
        num_warps=4, **launch_options(),
    )  # fmt: skip
    return out

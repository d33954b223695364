"""Draw one token per row without sorting: two launches, three where a row has min-p, top-k or top-p.

``_summarise`` reads the logits once and leaves the maximum and the sum of exponentials of every ``PART`` tokens.
``_choose`` finds the part that the row's uniform number falls into and reads that part alone; a greedy row takes the
part with the largest maximum. ``_choose_filtered`` collects the tokens above a bound that surely holds all that the
filters keep, finds the exact threshold among them by bisection over the order of float32, and draws among those that
stay. Tokens are drawn in the order of their ids from the same uniform number as on the CPU, so both agree except where
it falls within rounding of the border between two tokens. Sums run in a fixed order: results do not depend on the
batch. See ``kernels/sampling``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.launch import has_pdl, launch_options

PART = 256
_PARTS = 8
"""Parts of one program of ``_summarise``."""
_CANDIDATES = 4096
"""Tokens that ``_choose_filtered`` holds in registers; a wider set is read again at every step of the bisection."""
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)
_COLUMNS = ["row_index", "temperature", "stream", "num_prompt", "log_min_p", "top_k", "top_p", "length", "tokens"]
"""Read one number at a time, so their alignment is no reason to compile anew."""


@triton.jit
def _uniform(stream, position):
    """The ``position``-th number of a stream in ``[0, 1)``, float64: as ``uniform_ref``, bit for bit."""
    # int64 arithmetic wraps like uint64; a right shift must be masked to be a logical one.
    z = (position + 1) * -7046029254386353131 + stream
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return ((z >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) * 2.220446049250313e-16


@triton.jit
def _key(x):
    """int32 in the order of the float32 numbers; its own inverse on bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Between ``low`` (excluded) and ``high``; the difference may not fit into int32."""
    wide = low.to(tl.int64)
    return (wide + (high.to(tl.int64) - wide + 1) // 2).to(tl.int32)


@triton.jit
def _weights(x, best):
    """``exp(x - best)``, 1 at the best even if that is infinite; NaN stays."""
    return tl.where(x == best, 1.0, tl.exp(x - tl.where(best == float("-inf"), 0.0, best)))


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _summarise(
    logits, row_index, temperature, part_max, part_sum, part_arg, stride, V,
    NUM_PARTS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    token = part[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    heat = tl.load(temperature + tl.load(row_index + place))
    x = tl.load(logits + place * stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
    x = x / tl.where(heat > 0, heat, 1.0)
    best = tl.max(x, 1)
    weights = _weights(x, best[:, None])
    at = place * NUM_PARTS + part
    mask = part < NUM_PARTS
    tl.store(part_max + at, best, mask=mask)
    # Whatever is -inf weighs nothing, also where a whole part is.
    tl.store(part_sum + at, tl.sum(tl.where(x == float("-inf"), 0.0, weights), 1), mask=mask)
    tl.store(part_arg + at, part * SIZE + tl.argmax(x, 1), mask=mask)


@triton.jit
def _total(part_max, part_sum, place, NUM_PARTS: tl.constexpr, PAD: tl.constexpr):
    """Maxima of the parts, the largest one, and the weight of each part relative to it in float64."""
    part = tl.arange(0, PAD)
    mask = part < NUM_PARTS
    maxima = tl.load(part_max + place * NUM_PARTS + part, mask=mask, other=float("-inf"))
    sums = tl.load(part_sum + place * NUM_PARTS + part, mask=mask, other=0.0)
    best = tl.max(maxima, 0)
    weights = sums.to(tl.float64) * _weights(maxima, best).to(tl.float64)
    return maxima, best, tl.where(sums == 0.0, 0.0, weights)


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _choose(
    logits, row_index, temperature, stream, num_prompt, log_min_p, top_k, top_p, length, part_max, part_sum, part_arg,
    tokens, stride, V,
    NUM_PARTS: tl.constexpr, PAD: tl.constexpr, SIZE: tl.constexpr, HAS_FILTERS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(row_index + place)
    heat = tl.load(temperature + row)
    if HAS_FILTERS:
        if (heat > 0) & (
            (tl.load(log_min_p + row) > float("-inf")) | (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1)
        ):
            return
    maxima, best, weights = _total(part_max, part_sum, place, NUM_PARTS, PAD)
    part = tl.arange(0, PAD)
    total = tl.sum(weights, 0)
    if heat > 0:
        u = _uniform(tl.load(stream + row), tl.load(length + place) - tl.load(num_prompt + row))
        target = u * total
        is_above = (tl.cumsum(weights, 0) > target) & (weights > 0)
        chosen = tl.min(tl.where(is_above, part, PAD), 0)
        # Rounding may leave no part above the target: then the last one that weighs anything.
        chosen = tl.where(chosen < PAD, chosen, tl.max(tl.where(weights > 0, part, 0), 0))
        before = tl.sum(tl.where(part < chosen, weights, 0.0), 0)
        offs = tl.arange(0, SIZE)
        token = chosen * SIZE + offs
        x = tl.load(logits + place * stride + token, mask=token < V, other=float("-inf")).to(tl.float32) / heat
        inner = tl.where(x == float("-inf"), 0.0, _weights(x, best)).to(tl.float64)
        is_above = (before + tl.cumsum(inner, 0) > target) & (inner > 0)
        offset = tl.min(tl.where(is_above, offs, SIZE), 0)
        offset = tl.where(offset < SIZE, offset, tl.max(tl.where(inner > 0, offs, 0), 0))
        result = chosen * SIZE + offset
        is_valid = (total > 0) & (best < float("inf"))
    else:
        first = tl.min(tl.where(maxima == best, part, PAD - 1), 0)
        result = tl.load(part_arg + place * NUM_PARTS + tl.minimum(first, NUM_PARTS - 1))
        is_valid = total > 0
    tl.store(tokens + place, tl.where(is_valid, result, -1).to(tl.int64))


@triton.jit
def _above(logits, at, start, heat, V, CHUNK: tl.constexpr):
    """Token ids and scaled logits of one chunk of a row; -0 becomes 0, so that the keys of equal numbers are equal."""
    token = start + tl.arange(0, CHUNK)
    x = tl.load(logits + at + token, mask=token < V, other=float("-inf")).to(tl.float32)
    return token, x / heat + 0.0


@triton.jit
def _search(
    logits, at, heat, V, values, best, low, high, wanted, is_wide, IS_COUNT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest key at which the tokens from it on are at least ``wanted``, by number or by weight; at least ``low``.

    Over ``values [CHUNK]`` (padded with -inf), or over the whole row where the set is wide.
    """
    keys = _key(values)
    if IS_COUNT:
        amounts = tl.where(values > float("-inf"), 1.0, 0.0)
    else:
        amounts = tl.where(values > float("-inf"), _weights(values, best), 0.0)
    while low < high:
        middle = _middle(low, high)
        if is_wide:
            running = tl.zeros([CHUNK], tl.float32)
            for start in range(0, V, CHUNK):
                _, x = _above(logits, at, start, heat, V, CHUNK)
                if IS_COUNT:
                    running += tl.where((_key(x) >= middle) & (x > float("-inf")), 1.0, 0.0)
                else:
                    running += tl.where((_key(x) >= middle) & (x > float("-inf")), _weights(x, best), 0.0)
            amount = tl.sum(running, 0)
        else:
            amount = tl.sum(tl.where(keys >= middle, amounts, 0.0), 0)
        if amount >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _choose_filtered(
    logits, row_index, temperature, stream, num_prompt, log_min_p, top_k, top_p, length, part_max, part_sum, scratch,
    scratch_token, tokens, thresholds, stride, V,
    NUM_PARTS: tl.constexpr, PAD: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(row_index + place)
    heat = tl.load(temperature + row)
    min_p = tl.load(log_min_p + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    if (heat <= 0) | ((min_p == float("-inf")) & (k <= 0) & (p >= 1)):
        tl.store(thresholds + place, float("-inf"))
        return
    maxima, best, weights = _total(part_max, part_sum, place, NUM_PARTS, PAD)
    total = tl.sum(weights, 0)
    if (total > 0) & (best < float("inf")):
        at = place * stride
        offs = tl.arange(0, CHUNK)
        # 1. A bound below which nothing can stay. Rounding of best + log(1) must not rule out the best token itself.
        share_bound = tl.minimum(best + min_p, best)
        bound = share_bound
        if k > 0:
            # At least k tokens reach the k-th largest maximum of the parts.
            low = _key(tl.full([], float("-inf"), tl.float32))
            high = _key(best + 0.0)
            keys = _key(maxima + 0.0)
            while low < high:
                middle = _middle(low, high)
                if tl.sum((keys >= middle).to(tl.int32), 0) >= k:
                    low = middle
                else:
                    high = middle - 1
            bound = tl.maximum(bound, _from_key(low))
        if p < 1:
            if (k <= 0) & (min_p == float("-inf")):
                # All tokens lighter than this together weigh less than the share that may be lost.
                lost = (1.0 - p) * total / V
                bound = tl.maximum(bound, best + tl.log(tl.maximum(lost, 1e-300)).to(tl.float32) - 1e-4)
        # 2. Collect the tokens above the bound, in the order of their ids.
        base = place * CHUNK
        count = 0
        part = tl.arange(0, PAD)
        for start in range(0, V, CHUNK):
            chunk_best = tl.max(tl.where(part // (CHUNK // SIZE) == start // CHUNK, maxima, float("-inf")), 0)
            if chunk_best >= bound:
                token, x = _above(logits, at, start, heat, V, CHUNK)
                is_kept = (x >= bound) & (x > float("-inf"))
                to = count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
                fits = is_kept & (to < CHUNK)
                tl.store(scratch + base + to, x, mask=fits)
                tl.store(scratch_token + base + to, token, mask=fits)
                count += tl.sum(is_kept.to(tl.int32), 0)
        tl.debug_barrier()
        is_wide = count > CHUNK
        values = tl.load(scratch + base + offs, mask=offs < count, other=float("-inf"))
        ids = tl.load(scratch_token + base + offs, mask=offs < count, other=0)
        # 3. The threshold: min-p, then top-k, then top-p over what these leave.
        low = _key(bound + 0.0)
        high = _key(best + 0.0)
        if k > 0:
            low = _search(logits, at, heat, V, values, best, low, high, k.to(tl.float32), is_wide, True, CHUNK)
            low = tl.maximum(low, _key(share_bound + 0.0))
        if p < 1:
            kept = total
            if (k > 0) | (min_p > float("-inf")):
                if is_wide:
                    running = tl.zeros([CHUNK], tl.float32)
                    for start in range(0, V, CHUNK):
                        _, x = _above(logits, at, start, heat, V, CHUNK)
                        running += tl.where((_key(x) >= low) & (x > float("-inf")), _weights(x, best), 0.0)
                    kept = tl.sum(running, 0).to(tl.float64)
                else:
                    is_kept = (_key(values) >= low) & (values > float("-inf"))
                    kept = tl.sum(tl.where(is_kept, _weights(values, best), 0.0), 0).to(tl.float64)
            low = _search(
                logits, at, heat, V, values, best, low, high, (p * kept).to(tl.float32), is_wide, False, CHUNK
            )
        tl.store(thresholds + place, _from_key(low))
        # 4. Draw among what stays.
        u = _uniform(tl.load(stream + row), tl.load(length + place) - tl.load(num_prompt + row))
        chosen = tl.full([], _NO_TOKEN, tl.int32)
        last = tl.full([], -1, tl.int32)
        if is_wide:
            running = tl.zeros([CHUNK], tl.float32)
            whole = tl.zeros([], tl.float64)
            for start in range(0, V, CHUNK):
                _, x = _above(logits, at, start, heat, V, CHUNK)
                e = tl.where((_key(x) >= low) & (x > float("-inf")), _weights(x, best), 0.0)
                whole += tl.sum(e.to(tl.float64), 0)
            before = tl.zeros([], tl.float64)
            for start in range(0, V, CHUNK):
                token, x = _above(logits, at, start, heat, V, CHUNK)
                e = tl.where((_key(x) >= low) & (x > float("-inf")), _weights(x, best), 0.0).to(tl.float64)
                is_hit = (before + tl.cumsum(e, 0) > u * whole) & (e > 0)
                chosen = tl.minimum(chosen, tl.min(tl.where(is_hit, token, _NO_TOKEN), 0))
                last = tl.maximum(last, tl.max(tl.where(e > 0, token, -1), 0))
                before += tl.sum(e, 0)
        else:
            e = tl.where((_key(values) >= low) & (values > float("-inf")), _weights(values, best), 0.0).to(tl.float64)
            is_hit = (tl.cumsum(e, 0) > u * tl.sum(e, 0)) & (e > 0)
            chosen = tl.min(tl.where(is_hit, ids, _NO_TOKEN), 0)
            last = tl.max(tl.where(e > 0, ids, -1), 0)
        tl.store(tokens + place, tl.where(chosen < _NO_TOKEN, chosen, last).to(tl.int64))
    else:
        tl.store(thresholds + place, float("-inf"))
        tl.store(tokens + place, tl.full([], -1, tl.int64))


def draw_rows(
    logits_LV: Tensor, temperature: Tensor, stream: Tensor, num_prompt: Tensor, log_min_p: Tensor, top_k: Tensor,
    top_p: Tensor, row_index_L: Tensor, length_L: Tensor, has_filters: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``kernels.sampling.rows.draw_rows_ref``; rows of ``logits_LV`` are contiguous. Two launches, three with
    filters.

    Returns:
        Tokens, and the thresholds ``[L]`` float32 of the scaled logits that stay (None without filters).
    """
    rows, vocab_size = logits_LV.shape
    device = logits_LV.device
    num_parts = triton.cdiv(vocab_size, PART)
    part_max = torch.empty((rows, num_parts), dtype=torch.float32, device=device)
    part_sum = torch.empty_like(part_max)
    part_arg = torch.empty((rows, num_parts), dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    stride = logits_LV.stride(0)
    _summarise[(rows, triton.cdiv(num_parts, _PARTS))](
        logits_LV, row_index_L, temperature, part_max, part_sum, part_arg, stride, vocab_size, num_parts, _PARTS, PART,
        has_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip
    columns = (row_index_L, temperature, stream, num_prompt, log_min_p, top_k, top_p, length_L)
    pad = max(16, triton.next_power_of_2(num_parts))
    _choose[(rows,)](
        logits_LV, *columns, part_max, part_sum, part_arg, tokens, stride, vocab_size, num_parts, pad, PART,
        has_filters, has_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip
    if not has_filters:
        return tokens, None
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    scratch = torch.empty((rows, _CANDIDATES), dtype=torch.float32, device=device)
    scratch_token = torch.empty((rows, _CANDIDATES), dtype=torch.int32, device=device)
    _choose_filtered[(rows,)](
        logits_LV, *columns, part_max, part_sum, scratch, scratch_token, tokens, thresholds, stride, vocab_size,
        num_parts, pad, PART, _CANDIDATES, has_pdl(), num_warps=8, **launch_options(),
    )  # fmt: skip
    return tokens, thresholds

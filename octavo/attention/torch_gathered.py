"""Attention by torch's SDPA over gathered pages, on any device: what ``torch_sdpa`` does where it is not on a CPU.

The fallback when nothing faster serves a model, and what other backends are compared with. Everything is planned from
host integers, so nothing waits for the device; requests with one query share a padded batch, longer ones are cut into
pieces. Knows no request and no model. Paper: Kwon et al., SOSP 2023 (paging).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from octavo.attention.backend import AttentionSpec
from octavo.batch import AttentionMetadata, StepShape

_MAX_GATHERED = 1 << 16
"""Tokens whose keys are gathered at once, padding included: 256 MiB for 8 heads of 128 in 16 bits."""
_MAX_QUERIES = 512
"""Of one request at once: bounds mask and scores."""


@dataclass(slots=True)
class PaddedBatch:
    """``R`` requests with ``Q`` queries each over ``K`` keys, padded."""

    tokens: Tensor
    """[R * Q] int64, where the queries are in the step."""
    slots: Tensor
    """[R, K] int64 cache slots; padding points at the request's first key, which is never seen but never garbage."""
    is_seen: Tensor
    """[R, 1, Q, K] bool."""


@dataclass(slots=True)
class GatheredMetadata(AttentionMetadata):
    """The batches of a step."""

    num_tokens: int
    batches: list[PaddedBatch]


class GatheredAttention:
    """Plan and compute over a cache ``[N, P, 2, G, D]``."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def plan(self, step: StepShape, block_table: Tensor, slot_mapping: Tensor) -> GatheredMetadata:
        """Cut the step into padded batches; reads no device memory on the host."""
        starts = [0]
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        batches: list[PaddedBatch] = []
        decodes: list[int] = []
        longest = 0
        for row, (count, length) in enumerate(zip(step.query_lens, step.seq_lens, strict=True)):
            if count == 1:
                longest = max(longest, length)
                if decodes and (len(decodes) + 1) * longest > _MAX_GATHERED:
                    batches.append(self._batch(step, block_table, decodes, [starts[each] for each in decodes], 1))
                    decodes, longest = [], length
                decodes.append(row)
                continue
            for first in range(0, count, _MAX_QUERIES):
                size = min(_MAX_QUERIES, count - first)
                batches.append(self._batch(step, block_table, [row], [starts[row] + first], size, count - first - size))
        if decodes:
            batches.append(self._batch(step, block_table, decodes, [starts[each] for each in decodes], 1))
        return GatheredMetadata(slot_mapping, block_table, step.num_tokens, batches)

    def _batch(
        self, step: StepShape, block_table: Tensor, rows: Sequence[int], firsts: Sequence[int], num_queries: int,
        num_later: int = 0,
    ) -> PaddedBatch:  # fmt: skip
        """Queries ``firsts[i] .. + num_queries`` of requests ``rows``, after which ``num_later`` of the step remain."""
        page, device, window = self._spec.block_size, block_table.device, self._spec.sliding_window
        ends = [step.seq_lens[row] - num_later for row in rows]
        keys = [0 if window is None else max(0, end - num_queries + 1 - window) for end in ends]
        host = torch.tensor([rows, firsts, ends, keys])
        row, first, end, key = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        num_keys = max(end_ - key_ for end_, key_ in zip(ends, keys, strict=True))
        queries = torch.arange(num_queries, device=device)
        positions = key[:, None] + torch.arange(num_keys, device=device)  # [R, K]
        at = (end - num_queries)[:, None] + queries  # [R, Q]
        is_seen = positions[:, None] <= at[..., None]
        if window is not None:
            is_seen &= positions[:, None] > at[..., None] - window
        held = torch.where(positions < end[:, None], positions, key[:, None])
        slots = block_table[row].gather(1, held // page).long() * page + held % page
        return PaddedBatch((first[:, None] + queries).flatten(), slots, is_seen[:, None])

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend. Padding writes back what slot 0, of the null block, holds."""
        slots = cache.flatten(0, 1)
        is_real = (meta.slot_mapping >= 0)[:, None, None, None]
        at = meta.slot_mapping.clamp_min(0)
        new = torch.stack((k, v), 1).to(slots.dtype)
        slots.index_copy_(0, at, torch.where(is_real, new, slots[at]))

    def attend(
        self, q: Tensor, cache: Tensor, meta: GatheredMetadata, out: Tensor, sinks: Tensor | None = None
    ) -> None:
        """See AttentionBackend."""
        spec, slots = self._spec, cache.flatten(0, 1)
        if meta.num_tokens < len(out):
            out[meta.num_tokens :].zero_()
        for batch in meta.batches:
            pair = slots[batch.slots].to(q.dtype)  # [R, K, 2, G, D]
            keys, values = (
                each.transpose(1, 2).repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
                for each in pair.unbind(2)
            )
            queries = q[batch.tokens].unflatten(0, (len(batch.slots), -1)).transpose(1, 2)  # [R, H, Q, D]
            if sinks is not None:
                result = _attend_with_sinks(queries, keys, values, batch.is_seen, spec.scale, sinks)
            elif spec.logit_softcap is None:
                result = scaled_dot_product_attention(queries, keys, values, batch.is_seen, scale=spec.scale)
            else:
                scores = (queries @ keys.transpose(2, 3)).float() * spec.scale
                scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
                weights = scores.masked_fill(~batch.is_seen, float("-inf")).softmax(-1)
                result = weights.to(values.dtype) @ values
            out[batch.tokens] = result.transpose(1, 2).flatten(0, 1)


def _attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, is_seen: Tensor, scale: float, sinks: Tensor) -> Tensor:
    """``q [R, H, Q, D]`` over ``k``, ``v`` ``[R, H, K, D]`` where ``is_seen [R, 1, Q, K]``; one score more a head."""
    scores = ((q @ k.transpose(2, 3)).float() * scale).masked_fill(~is_seen, float("-inf"))
    sink = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(v.dtype) @ v

"""Attention by torch's FlexAttention over the paged cache: the backend to extend with a score of your own.

Override ``modify`` in a subclass: it sees a score, the head, and the positions of query and key in their request, and
returns another score (docs/extending/attention-backend.md has an example). Pages are not gathered on a GPU: the whole
cache is the keys of one long sequence, and a block mask names the pages that a request may look at. On a CPU, where
FlexAttention computes every score before it masks, the pages in use are copied first; that is for tests and trials.
Paper: Dong et al., "Flex Attention", 2024; Kwon et al., SOSP 2023 (paging).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from octavo.attention.backend import AttentionSpec
from octavo.batch import AttentionMetadata, StepShape

_QUERY_BLOCK = 128
"""Queries of a block of the mask; a long request's queries are padded to its multiple on a GPU."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class FlexCall:
    """``R`` requests with ``Q`` queries each."""

    tokens: Tensor
    """[R, Q] int64 positions in the step; those beyond ``num_queries`` repeat the last."""
    num_queries: int
    mask: flex.BlockMask
    score_mod: Callable[..., Tensor] | None


@dataclass(slots=True)
class FlexMetadata(AttentionMetadata):
    """A step; its calls are made by the first layer, which knows how many pages there are."""

    step: StepShape
    pages: Tensor | None = None
    """[U] int64, the pages in use, when they are copied."""
    calls: list[FlexCall] = field(default_factory=list[FlexCall])


class FlexBackend:
    """See the module. Cache: ``[2, G, N, P, D]``."""

    name: ClassVar[str] = "FLEX_ATTENTION"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        is_plain = type(self).modify is FlexBackend.modify and spec.logit_softcap is None
        self._modifies = not is_plain

    def modify(self, score: Tensor, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The score to use instead of ``score``, which is scaled and soft-capped. Scalars; compiled on a GPU."""
        del head, query_position, key_position
        return score

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        if spec.dtype not in _DTYPES or spec.kv_dtype not in _DTYPES:
            return f"dtype {spec.dtype} with a {spec.kv_dtype} cache is not one of float32, bfloat16, float16"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} KV heads"
        if spec.has_sinks:
            return "it has no attention sinks"
        if device_type == "cpu":
            return None
        if spec.kv_dtype != spec.dtype:
            return f"FlexAttention has one type for queries and keys, not {spec.dtype} and {spec.kv_dtype}"
        if spec.head_dim < 16:
            return f"head size {spec.head_dim} is below 16"
        if importlib.util.find_spec("triton") is None:
            return "FlexAttention is compiled with Triton, which is not installed"
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[2, G, N, P, D]``: keys of a head are one long sequence."""
        return (2, self._spec.num_kv_heads, num_blocks, self._spec.block_size, self._spec.head_dim)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> FlexMetadata:
        """See AttentionBackend."""
        del query_start_loc, seq_lens  # the step has them as integers
        return FlexMetadata(slot_mapping, block_table, step)

    def kv_views(self, cache: Tensor) -> tuple[Tensor, Tensor] | None:
        """See AttentionBackend."""
        if cache.device.type == "cpu":
            return None
        return cache[0].permute(1, 2, 0, 3), cache[1].permute(1, 2, 0, 3)

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend. Padding writes back what slot 0, of the null block, holds."""
        slots = cache.flatten(2, 3)  # [2, G, N * P, D]
        at = meta.slot_mapping.clamp_min(0)
        new = torch.stack((k, v)).transpose(1, 2).to(slots.dtype)
        is_real = (meta.slot_mapping >= 0)[:, None]
        slots.index_copy_(2, at, torch.where(is_real, new, slots[:, :, at]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
        """See AttentionBackend."""
        del k, v  # read from the cache
        assert isinstance(meta, FlexMetadata)
        if not meta.calls:
            self._make_calls(meta, cache.shape[2], is_copied=cache.device.type == "cpu")
        if meta.step.num_tokens < len(out):
            out[meta.step.num_tokens :].zero_()
        if meta.pages is not None:
            # A copy: unwritten slots may hold NaN, and nothing times NaN is NaN.
            cache = cache[:, :, meta.pages].to(q.dtype).nan_to_num_()
        keys, values = cache.flatten(2, 3).unsqueeze(1)  # [1, G, S, D] each
        for call in meta.calls:
            result = _attention(
                q[call.tokens].transpose(1, 2), keys, values, call.score_mod, call.mask, self._spec.scale,
                min(64, self._spec.block_size),
            )  # fmt: skip
            tokens = call.tokens[:, : call.num_queries]
            out[tokens] = result.transpose(1, 2)[:, : call.num_queries].to(out.dtype)

    def _make_calls(self, meta: FlexMetadata, num_blocks: int, *, is_copied: bool) -> None:
        """One call for all requests with one query, and one for each other."""
        step, table = meta.step, meta.block_table
        if is_copied:
            longest = -(-step.max_seq_len // self._spec.block_size)
            pages, table = table[: step.num_reqs, :longest].long().unique(return_inverse=True)
            meta.pages, num_blocks = pages, len(pages)
        starts = [0]
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        decodes = [row for row, count in enumerate(step.query_lens) if count == 1]
        groups = [decodes] if decodes else []
        groups += [[row] for row, count in enumerate(step.query_lens) if count > 1]
        for rows in groups:
            meta.calls.append(self._make_call(step, starts, rows, table, num_blocks, is_padded=not is_copied))

    def _make_call(
        self, step: StepShape, starts: Sequence[int], rows: list[int], table: Tensor, num_blocks: int, *,
        is_padded: bool,
    ) -> FlexCall:  # fmt: skip
        page, device, window = self._spec.block_size, table.device, self._spec.sliding_window
        count = step.query_lens[rows[0]]
        padded = -(-count // _QUERY_BLOCK) * _QUERY_BLOCK if is_padded and count > 1 else count
        host = torch.tensor([rows, [starts[row] for row in rows], [step.seq_lens[row] - count for row in rows]])
        uploaded = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        row, start, first = uploaded.unbind(0)  # first: position of the first query
        longest = -(-max(step.seq_lens[row] for row in rows) // page)
        held = table[row, :longest].long()  # [R, longest] pages in order
        logical = torch.full((len(rows), num_blocks), -1, dtype=torch.int32, device=device)
        order = torch.arange(longest, dtype=torch.int32, device=device)
        # What the table lists beyond a request's length, or before its window, may be another block of it by now: the
        # last place counts.
        in_use = torch.where(order < (first[:, None] + count - 1) // page + 1, order, -1)
        logical.scatter_reduce_(1, held, in_use, "amax")
        # Pages that some query of a block sees: from the window of its first to the page of its last.
        block = torch.arange(0, padded, _QUERY_BLOCK, device=device)
        last = first[:, None] + (block + _QUERY_BLOCK - 1).clamp_max(count - 1)
        low = torch.zeros_like(last) if window is None else (first[:, None] + block - window + 1).clamp_min(0) // page
        num_seen = (last // page - low + 1).clamp_min(0)
        at = (low[..., None] + order).clamp_max(longest - 1)  # [R, blocks, longest]
        indices = held[:, None].expand(-1, len(block), -1).gather(2, at)
        mask = flex.BlockMask.from_kv_blocks(
            num_seen[:, None].int(), indices[:, None].int().contiguous(), BLOCK_SIZE=(_QUERY_BLOCK, page),
            mask_mod=self._mask_mod(logical, first), seq_lengths=(padded, num_blocks * page), **_mask_options(),
        )  # fmt: skip
        tokens = start[:, None] + torch.arange(padded, device=device).clamp_max(count - 1)
        return FlexCall(tokens, count, mask, self._score_mod(logical, first) if self._modifies else None)

    def _mask_mod(self, logical: Tensor, first: Tensor) -> Callable[..., Tensor]:
        """Whether a query sees a slot of the cache; FlexAttention calls it with scalars."""
        page, window = self._spec.block_size, self._spec.sliding_window

        def mask_mod(request: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            del head
            number = logical[request, slot // page]
            key_position, query_position = number * page + slot % page, first[request] + query
            is_seen = (number >= 0) & (key_position <= query_position)
            return is_seen if window is None else is_seen & (key_position > query_position - window)

        return mask_mod

    def _score_mod(self, logical: Tensor, first: Tensor) -> Callable[..., Tensor]:
        page, modify = self._spec.block_size, self.modify
        # A tensor: of a captured number torch's compiler makes a symbol that it cannot lower (torch 2.11).
        cap = self._spec.logit_softcap
        softcap = None if cap is None else torch.full((), cap, device=first.device)

        def score_mod(score: Tensor, request: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return modify(score, head, first[request] + query, logical[request, slot // page] * page + slot % page)

        return score_mod


@functools.cache
def _mask_options() -> dict[str, Any]:
    """The transposed mask is for training; making it takes time."""
    known = inspect.signature(flex.BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": False} if "compute_q_blocks" in known else {}


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention, dynamic=True)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor] | None, mask: flex.BlockMask, scale: float,
    key_tile: int,
) -> Tensor:  # fmt: skip
    """``q [R, H, Q, D]`` over ``k``, ``v`` ``[1, G, S, D]``."""
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scale}
    if q.device.type != "cpu":
        # A tile of keys must not cross a page, which is a block of the mask.
        return _compiled()(q, k, v, enable_gqa=True, kernel_options={"BLOCK_N": key_tile}, **options)
    k, v = (each.expand(len(q), -1, -1, -1) for each in (k, v))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex.flex_attention(q, k, v, enable_gqa=True, **options)

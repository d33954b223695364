"""Attention over a paged cache by torch's own operators: on the CPU here, elsewhere in ``torch_gathered``.

The cache of a layer is ``[N, P, 2, G, D]``: a token's keys and values side by side, so that one copy writes both and a
run of consecutive block ids is one strided view, read without copying. Histories that are scattered are gathered. A
step is cut into *spans*: consecutive queries of one request together with the keys that they may see.
Knows no request and no model. Papers: Kwon et al., SOSP 2023 (paging); Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.attention.torch_gathered import GatheredAttention, GatheredMetadata
from octavo.batch import AttentionMetadata, StepShape

_MAX_MASKED_QUERIES = 256
"""Queries of a masked span: bounds the mask's memory and the work above the diagonal."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Span:
    """Queries ``[query_start, query_end)`` of the batch over keys ``[key_start, key_end)`` of their request."""

    query_start: int
    query_end: int
    num_keys: int
    first_slot: int
    """Cache slot of the first key when the keys lie in one run; -1 otherwise."""
    slots: Tensor | None
    """[num_keys] int64 when they are scattered."""
    is_fresh: bool
    """All keys belong to this step: they are read from k and v, under a causal mask."""
    mask: Tensor | None
    """[queries, num_keys] added to the scores, None when every query sees every key."""


@dataclass(slots=True)
class TorchSdpaMetadata(AttentionMetadata):
    """The spans of a step, and where its tokens are written."""

    num_tokens: int
    spans: list[Span]
    written: Tensor | None
    """Token positions whose slot is not -1; None when that is all of them."""


class TorchSdpaBackend:
    """See the module."""

    name: ClassVar[str] = "TORCH_SDPA"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._gathered = GatheredAttention(spec)

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        del device_type
        if spec.dtype not in _DTYPES or spec.kv_dtype not in _DTYPES:
            return f"dtype {spec.dtype} with a {spec.kv_dtype} cache is not one of float32, bfloat16, float16"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} KV heads"
        if spec.has_sinks and spec.logit_softcap is not None:
            return "it has no logit softcap together with sinks"
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[N, P, 2, G, D]``."""
        return (num_blocks, self._spec.block_size, 2, self._spec.num_kv_heads, self._spec.head_dim)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> TorchSdpaMetadata | GatheredMetadata:
        """See AttentionBackend."""
        if block_table.device.type != "cpu":
            return self._gathered.plan(step, block_table, slot_mapping)
        starts: list[int] = query_start_loc[: step.num_reqs + 1].tolist()
        lens: list[int] = seq_lens[: step.num_reqs].tolist()
        is_written = slot_mapping >= 0
        written = None if bool(is_written.all()) else is_written.nonzero().squeeze(1)
        slots = slot_mapping if written is None else slot_mapping[written]
        spans = self.plan_spans(range(len(lens)), starts, lens, block_table)
        return TorchSdpaMetadata(slots, block_table, starts[-1], spans, written)

    def plan_spans(
        self, requests: Sequence[int], starts: Sequence[int], lens: Sequence[int], block_table: Tensor
    ) -> list[Span]:
        """The spans of some requests of a step: ``starts [B + 1]`` are query offsets, ``lens [B]`` key counts."""
        if not requests:
            return []
        is_run = _runs(block_table[: len(lens)], lens, self._spec.block_size)
        spans: list[Span] = []
        for index in requests:
            if starts[index + 1] > starts[index]:
                spans += self._spans(starts[index], starts[index + 1], lens[index], block_table[index], is_run[index])
        return spans

    def kv_views(self, cache: Tensor) -> tuple[Tensor, Tensor] | None:
        """See AttentionBackend. None on a CPU: the rotation is a pass of its own there."""
        return None if cache.device.type == "cpu" else (cache[:, :, 0], cache[:, :, 1])

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend."""
        if isinstance(meta, GatheredMetadata):
            self._gathered.write(k, v, cache, meta)
            return
        assert isinstance(meta, TorchSdpaMetadata)
        _write(k, v, cache.flatten(0, 1), meta)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See AttentionBackend."""
        if isinstance(meta, GatheredMetadata):
            self._gathered.attend(q, cache, meta, out, sinks)
            return
        assert isinstance(meta, TorchSdpaMetadata)
        if meta.num_tokens < len(out):
            out[meta.num_tokens :].zero_()
        self.attend_spans(q, k, v, cache, meta.spans, out, sinks)

    def attend_spans(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, spans: Sequence[Span], out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attention of the spans' queries; the cache holds this step's keys already. Shapes as in ``attend``."""
        slots = cache.flatten(0, 1)  # [N * P, 2, G, D]
        for span in spans:
            query = q[span.query_start : span.query_end]
            if span.is_fresh:
                keys, values = k[span.query_start : span.query_end], v[span.query_start : span.query_end]
            else:
                if span.slots is None:
                    pair = slots[span.first_slot : span.first_slot + span.num_keys]
                else:
                    pair = slots[span.slots]
                pair = pair.to(q.dtype)
                keys, values = pair[:, 0], pair[:, 1]
            out[span.query_start : span.query_end] = self._attend(query, keys, values, span, sinks)

    def _spans(self, query_start: int, query_end: int, seq_len: int, blocks: Tensor, is_run: bool) -> list[Span]:
        """Cut one request's queries so that a span needs no mask, or a small one."""
        window = self._spec.sliding_window
        num_queries = query_end - query_start
        sees_all = window is None or seq_len <= window
        if num_queries > 1 and num_queries == seq_len and sees_all and self._spec.logit_softcap is None:
            return [Span(query_start, query_end, seq_len, -1, None, True, None)]
        spans: list[Span] = []
        history = seq_len - num_queries
        for start in range(0, num_queries, _MAX_MASKED_QUERIES):
            end = min(start + _MAX_MASKED_QUERIES, num_queries)
            key_end = history + end
            key_start = 0 if window is None else max(0, history + start + 1 - window)
            mask = None
            if end - start > 1:
                mask = _mask(history + start, history + end, key_start, window, self._spec.dtype)
            first_slot, slots = self._locate(blocks, is_run, key_start, key_end)
            spans.append(
                Span(query_start + start, query_start + end, key_end - key_start, first_slot, slots, False, mask)
            )
        return spans

    def _locate(self, blocks: Tensor, is_run: bool, key_start: int, key_end: int) -> tuple[int, Tensor | None]:
        size = self._spec.block_size
        if is_run:
            return int(blocks[0]) * size + key_start, None
        positions = torch.arange(key_start, key_end)
        return -1, blocks[positions // size].long() * size + positions % size

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span, sinks: Tensor | None = None) -> Tensor:
        """``q [Q, H, D]`` over ``k``, ``v`` ``[K, G, D]`` to ``[Q, H, D]``."""
        spec = self._spec
        if spec.logit_softcap is not None:
            return softcapped_attention_ref(q, k, v, spec.scale, spec.logit_softcap, span.mask)
        result, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            0.0,
            span.is_fresh,
            attn_mask=span.mask,
            scale=spec.scale,
        )
        if sinks is not None:
            # One more term in the sum of exponentials: sum / (sum + exp(sink)) of what was there without it.
            result = result * torch.sigmoid(log_sums - sinks[:, None])[..., None].to(result.dtype)
        return result[0].transpose(0, 1)


def softcapped_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None
) -> Tensor:
    """Attention whose scores pass through ``softcap * tanh(scores / softcap)``, in plain operators.

    Args:
        q: ``[Q, H, D]``.
        k: ``[K, G, D]``.
        v: ``[K, G, D]``.
        scale: Multiplies the products.
        softcap: Bound of the scores.
        mask: ``[Q, K]``, added afterwards.
    """
    num_queries, num_heads, size = q.shape
    groups = k.shape[1]
    grouped = q.view(num_queries, groups, num_heads // groups, size).permute(1, 2, 0, 3)  # [G, H/G, Q, D]
    scores = grouped @ k.permute(1, 2, 0).unsqueeze(1) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(-1).to(v.dtype)
    return (weights @ v.transpose(0, 1).unsqueeze(1)).permute(2, 0, 1, 3).reshape(q.shape)


def _mask(first: int, last: int, key_start: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """``[last - first, last - key_start]``: 0 where the query at a position sees the key, -inf elsewhere."""
    positions = torch.arange(first, last)[:, None]
    keys = torch.arange(key_start, last)
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _runs(table: Tensor, lens: Sequence[int], block_size: int) -> list[bool]:
    """Whether the blocks of each request have consecutive ids."""
    if table.shape[1] < 2:
        return [True] * len(lens)
    used = (torch.tensor(list(lens)) + block_size - 1) // block_size
    is_next = table[:, 1:] == table[:, :-1] + 1
    is_unused = torch.arange(1, table.shape[1]) >= used[:, None]
    return (is_next | is_unused).all(1).tolist()


def _write(k: Tensor, v: Tensor, slots: Tensor, meta: TorchSdpaMetadata) -> None:
    if meta.written is not None:
        k, v = k[meta.written], v[meta.written]
    slots[:, 0].index_copy_(0, meta.slot_mapping, k.to(slots.dtype))
    slots[:, 1].index_copy_(0, meta.slot_mapping, v.to(slots.dtype))

"""Attention of encoders: every token sees the whole text, all of it in this step; nothing is written to a cache.

On a CPU each text is one call of torch's fused operator; elsewhere all texts of a step are padded to the longest and
are one call. Knows no request and no model. The KV groups of such layers take no memory: their blocks only count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.batch import AttentionMetadata, StepShape


@dataclass(slots=True)
class EncoderMetadata(AttentionMetadata):
    """The texts of a step."""

    lengths: tuple[int, ...]
    masks: dict[int, Tensor]
    """Window masks by length, on a CPU."""
    padded: tuple[Tensor, Tensor, Tensor] | None
    """Elsewhere: ``[B, M]`` place in the step of each padded token, ``[B, 1, 1 or M, M]`` whether it may be seen, and
    ``[T]`` place of each token among the padded ones."""


class EncoderBackend:
    """See the module."""

    name: ClassVar[str] = "ENCODER_SDPA"
    is_bidirectional: ClassVar[bool] = True

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        del device_type
        if spec.logit_softcap is not None or spec.has_sinks:
            return "it has no logit softcap and no sinks"
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Nothing is kept."""
        return (num_blocks, 0)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> EncoderMetadata:
        """See AttentionBackend. Every text is in the step from its first token on."""
        assert step.query_lens == step.seq_lens, "an encoder's texts are computed in one piece"
        lengths = step.query_lens
        if slot_mapping.device.type != "cpu":
            padded = pad(step, query_start_loc, seq_lens, self._spec.sliding_window)
            return EncoderMetadata(slot_mapping, block_table, lengths, {}, padded)
        window = self._spec.sliding_window
        masks = {n: _window_mask(n, window, slot_mapping.device) for n in set(lengths) if window and n > window}
        return EncoderMetadata(slot_mapping, block_table, lengths, masks, None)

    def kv_views(self, cache: Tensor) -> None:
        """There is no cache."""

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """Nothing is kept."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
        """See AttentionBackend; not causal."""
        del cache
        assert isinstance(meta, EncoderMetadata)
        if meta.padded is not None:
            self._attend_padded(q, k, v, meta.padded, out)
            return
        start = 0
        for length in meta.lengths:
            end = start + length
            mask = meta.masks.get(length)
            one, keys, values = (each[start:end].transpose(0, 1).unsqueeze(0) for each in (q, k, v))
            out[start:end] = self._sdpa(one, keys, values, mask)[0].transpose(0, 1)
            start = end
        out[start:].zero_()

    def _attend_padded(
        self, q: Tensor, k: Tensor, v: Tensor, padded: tuple[Tensor, Tensor, Tensor], out: Tensor
    ) -> None:
        places, mask, token_place = padded
        queries, keys, values = (each[places].transpose(1, 2) for each in (q, k, v))  # [B, H, M, D]
        result = self._sdpa(queries, keys, values, mask).transpose(1, 2).flatten(0, 1)
        torch.index_select(result, 0, token_place, out=out)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        is_grouped = self._spec.num_heads != self._spec.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self._spec.scale, enable_gqa=is_grouped)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """``[length, length]`` bool: whether two tokens are at most ``window`` apart."""
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions).abs() <= window


def pad(
    step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The texts of a step as a rectangle.

    Args:
        step: B texts, the longest of M tokens.
        query_start_loc: ``[B + 1]``.
        seq_lens: ``[B]``.
        window: Tokens to each side that are seen; None for all.

    Returns:
        See ``EncoderMetadata.padded``. Nothing waits for the device.
    """
    device = seq_lens.device
    longest, count = step.max_query_len, step.num_reqs
    offsets = torch.arange(longest, device=device)
    starts, lengths = query_start_loc[:count].long(), seq_lens[:count].long()
    is_real = offsets < lengths[:, None]
    places = (starts[:, None] + offsets).clamp_(max=step.num_tokens - 1)
    mask = is_real[:, None, None, :]
    if window is not None and longest > window:
        mask = mask & _window_mask(longest, window, device)
        # A padded query must see something: a row of nothing but -inf is NaN, which would reach nobody, but slowly.
        mask = mask | (~is_real)[:, None, :, None]
    owner = torch.repeat_interleave(torch.arange(count, device=device), lengths, output_size=step.num_tokens)
    token_place = torch.arange(step.num_tokens, device=device) - starts[owner] + owner * longest
    return places, mask, token_place

"""Attention on a GPU by our own Triton kernels: split decode from a device work list, tiled prefill.

Requests with one query go to the decode kernel, the others to the prefill kernel, in one step if need be. Everything
that decode needs is computed on the device from lengths and tables, so a captured decode step stays right whatever the
lengths are. Knows no request and no model. See ``kernels/attention``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec, HeadPreparation
from octavo.batch import AttentionMetadata, StepShape
from octavo.kernels.attention.decode import WorkList, decode_attention, decode_tile, make_work_list
from octavo.kernels.attention.decode_few import decode_few, suits
from octavo.kernels.attention.kv_write import kv_write
from octavo.kernels.attention.prefill import PrefillShape, make_tile_list, prefill_attention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETER_SMS = 4
"""Multiprocessors that the interpreter pretends to have: enough to split histories in tests."""


@dataclass(slots=True)
class TritonMetadata(AttentionMetadata):
    """What all layers of a step share."""

    work: WorkList | None
    """Of the requests with one query; None when there are none. With ``few`` it is made by the first layer that calls
    ``attend``."""
    tiles: Tensor | None
    """Of the other requests; None when there are none."""
    few: FewDecodes | None

    @property
    def takes_projection(self) -> bool:
        """See AttentionMetadata."""
        return self.few is not None


@dataclass(frozen=True, slots=True)
class FewDecodes:
    """A step of few requests, each with one query."""

    query_start_loc: Tensor
    """[B + 1] int32."""
    seq_lens: Tensor
    """[B] int32."""


class TritonBackend:
    """See the module."""

    name: ClassVar[str] = "TRITON_ATTN"
    is_capturable: ClassVar[bool] = True

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._prefill = PrefillShape(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.kv_dtype.itemsize
        )

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type != "cuda" and not is_interpreted:
            return f"its kernels run on NVIDIA GPUs, not on {device_type}"
        if spec.dtype not in _DTYPES or spec.kv_dtype not in _DTYPES:
            return f"dtype {spec.dtype} with a {spec.kv_dtype} cache is not one of bfloat16, float16, float32"
        if not 16 <= spec.head_dim <= 256:
            return f"head size {spec.head_dim} is not between 16 and 256"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} KV heads"
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[N, 2, G, P, D]``."""
        return (num_blocks, 2, self._spec.num_kv_heads, self._spec.block_size, self._spec.head_dim)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> TritonMetadata:
        """See AttentionBackend. Allocates and launches only: capturable for decodes, and for bounds of any step."""
        spec = self._spec
        work = tiles = few = None
        is_decode = not step.is_bound and step.max_query_len == 1 and step.num_reqs == step.num_tokens
        if is_decode and suits(step.num_reqs, spec.num_heads, spec.num_kv_heads, spec.head_dim):
            few = FewDecodes(query_start_loc, seq_lens)
        elif step.is_bound or 1 in step.query_lens:
            work = self._cut(query_start_loc, seq_lens)
        if step.max_query_len > 1:
            if step.is_bound:
                num_tiles = self._prefill.most_tiles(step.num_tokens, step.num_reqs)
            else:
                num_tiles = self._prefill.num_tiles(step.query_lens)
            tiles = make_tile_list(query_start_loc, seq_lens, self._prefill, num_tiles, is_bound=step.is_bound)
        return TritonMetadata(slot_mapping, block_table, work, tiles, few)

    def _cut(self, query_start_loc: Tensor, seq_lens: Tensor) -> WorkList:
        spec = self._spec
        tile = decode_tile(spec.block_size, len(seq_lens), spec.head_dim)
        num_sms = _count_sms(seq_lens.device)
        return make_work_list(query_start_loc, seq_lens, spec.num_kv_heads, num_sms, tile, spec.sliding_window)

    def kv_views(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """See AttentionBackend."""
        return cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend."""
        kv_write(k, v, cache, meta.slot_mapping)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See AttentionBackend."""
        del k, v  # read from the cache
        assert isinstance(meta, TritonMetadata)
        spec = self._spec
        if meta.work is None and meta.few is not None:
            meta.work = self._cut(meta.few.query_start_loc, meta.few.seq_lens)
            meta.work.is_early = False  # made in the midst of the step
        if meta.work is not None:
            decode_attention(
                q, cache, meta.block_table, meta.work, out,
                scale=spec.scale, window=spec.sliding_window, softcap=spec.logit_softcap, sinks=sinks,
            )  # fmt: skip
        if meta.tiles is not None:
            prefill_attention(
                q, cache, meta.block_table, meta.tiles, self._prefill, out,
                scale=spec.scale, window=spec.sliding_window, softcap=spec.logit_softcap, sinks=sinks,
            )  # fmt: skip

    def attend_projection(
        self, qkv: Tensor, heads: HeadPreparation, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See ProjectionBackend."""
        assert isinstance(meta, TritonMetadata) and meta.few is not None
        spec = self._spec
        decode_few(
            qkv, cache, meta.block_table, meta.few.seq_lens, out, norms=heads.norms,
            table=torch.view_as_real(heads.table), positions=heads.positions, slot_mapping=meta.slot_mapping,
            scale=spec.scale, window=spec.sliding_window, softcap=spec.logit_softcap, sinks=sinks,
        )  # fmt: skip


def _count_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count

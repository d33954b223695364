"""Attention on the CPU by a compiled kernel over the paged cache: one call per layer for all decoding requests.

A decode step of 32 requests would be 32 operator calls per layer, or a gather of every history; the kernel walks block
tables itself and copies nothing. Its tasks are fixed spans of keys, so a request's result does not depend on its
neighbours. Prompts go through blocks of queries and keys whose bounds do not depend on how they were cut into chunks.
Paper: Kwon et al., SOSP 2023 (paging); Dao et al., "Flash-Decoding", 2023 (spans merged by their maxima).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.attention.torch_sdpa import Span, TorchSdpaBackend
from octavo.batch import AttentionMetadata, StepShape
from octavo.kernels.native import DecodePlan, NativeKernels, PrefillPlan, native_kernels, native_status

PREFILL_MULTIPLE = 16
"""Of the head size, for the kernel of prompts."""


@dataclass(slots=True)
class CpuPagedMetadata(AttentionMetadata):
    """Single queries for the kernel, longer ones as spans."""

    num_tokens: int
    decodes: DecodePlan | None
    prompts: PrefillPlan | None
    spans: list[Span]
    """What the compiled kernels cannot do."""


class CpuPagedBackend:
    """See the module. Cache as in ``torch_sdpa``: ``[N, P, 2, G, D]``."""

    name: ClassVar[str] = "CPU_PAGED"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._torch = TorchSdpaBackend(spec)
        native = native_kernels()
        assert native is not None, "unsupported() says when this backend cannot be used"
        self._native: NativeKernels = native

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        if device_type != "cpu":
            return f"it runs on the CPU, not on {device_type}"
        reason = TorchSdpaBackend.unsupported(spec, device_type)
        if reason is not None:
            return reason
        if spec.dtype is not torch.float32 or spec.kv_dtype is not torch.float32:
            return f"it computes in float32, not in {spec.dtype} with a {spec.kv_dtype} cache"
        if spec.logit_softcap is not None:
            return "it has no logit softcap"
        if spec.head_dim % 8:
            return f"head_dim {spec.head_dim} is not a multiple of 8"
        return native_status() if native_kernels() is None else None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[N, P, 2, G, D]``."""
        return self._torch.kv_shape(num_blocks)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> CpuPagedMetadata:
        """See AttentionBackend."""
        starts: list[int] = query_start_loc[: step.num_reqs + 1].tolist()
        lens: list[int] = seq_lens[: step.num_reqs].tolist()
        single = [index for index in range(len(lens)) if starts[index + 1] - starts[index] == 1]
        others = [index for index in range(len(lens)) if starts[index + 1] - starts[index] > 1]
        decodes = None
        if single:
            window = self._spec.sliding_window
            decodes = DecodePlan(
                block_table[: len(lens)] if not others else block_table[single],
                [starts[index] for index in single],
                [0 if window is None else max(0, lens[index] - window) for index in single],
                [lens[index] for index in single],
            )
        prompts = None
        spans: list[Span] = []
        if others and self._spec.head_dim % PREFILL_MULTIPLE == 0:
            counts = [starts[index + 1] - starts[index] for index in others]
            positions = [lens[index] - count for index, count in zip(others, counts, strict=True)]
            rows = range(len(others))
            runs = list(zip([starts[index] for index in others], counts, positions, rows, strict=True))
            prompts = PrefillPlan(self._visible_pages(block_table[others], positions), runs)
        elif others:
            spans = self._torch.plan_spans(others, starts, lens, block_table)
        return CpuPagedMetadata(slot_mapping, block_table, starts[-1], decodes, prompts, spans)

    def _visible_pages(self, table: Tensor, positions: list[int]) -> Tensor:
        """``table``, overwritten where it lists what is left over from before the window of the first query. The kernel
        reads whole blocks of keys and gives those outside a weight of 0, which times another request's NaN is NaN."""
        window = self._spec.sliding_window
        if window is not None:
            for row, position in enumerate(positions):
                first = max(0, position - window + 1) // self._spec.block_size
                table[row, :first] = table[row, first]
        return table

    def kv_views(self, cache: Tensor) -> None:
        """None: the compiled writer is faster."""

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend."""
        self._native.write_kv(k, v, cache, meta.slot_mapping)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See AttentionBackend."""
        assert isinstance(meta, CpuPagedMetadata)
        if meta.num_tokens < len(out):
            out[meta.num_tokens :].zero_()
        if meta.decodes is not None:
            self._native.decode_attention(q, cache, meta.decodes, self._spec.scale, out, sinks)
        if meta.prompts is not None:
            window = self._spec.sliding_window
            self._native.prefill_attention(q, cache, meta.prompts, self._spec.scale, out, window=window, sinks=sinks)
        if meta.spans:
            self._torch.attend_spans(q, k, v, cache, meta.spans, out, sinks)

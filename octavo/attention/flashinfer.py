"""``FLASHINFER``: FlashInfer's paged kernels where the package is installed, over the same cache as ``TRITON_ATTN``.

Its wrappers compile a module per shape on first use, which needs ``nvcc``, unless its package of compiled modules is
installed. Steps are planned from host integers; they are not recorded as graphs. Knows no request and no model.
Paper: Ye et al., "FlashInfer", 2025.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.attention.libraries import device_capability, is_installed
from octavo.batch import AttentionMetadata, StepShape

_WORKSPACE_BYTES = 128 << 20
"""What its documentation asks for: split results of decode and prefill."""
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class FlashInferCall:
    """Requests that one wrapper computes."""

    tokens: Tensor
    """[n] int64, their queries in the step."""
    wrapper: Any


@dataclass(slots=True)
class FlashInferMetadata(AttentionMetadata):
    """Planned wrappers of a step."""

    num_tokens: int
    calls: list[FlashInferCall]


class FlashInferBackend:
    """See the module. Cache: ``[N, 2, G, P, D]``, which FlashInfer calls HND."""

    name: ClassVar[str] = "FLASHINFER"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._decode: Any = None
        self._prefill: Any = None

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        if device_type != "cuda":
            return f"its kernels run on NVIDIA GPUs, not on {device_type}"
        if not is_installed("flashinfer"):
            return "the package flashinfer-python is not installed"
        if not is_installed("flashinfer_jit_cache") and not _has_compiler():
            return "it compiles its kernels, and there is neither nvcc nor the package flashinfer-jit-cache"
        capability = device_capability()
        if capability is not None and capability < (7, 5):
            return f"it is not made for GPUs of compute capability {capability[0]}.{capability[1]}"
        if spec.dtype not in _DTYPES or spec.kv_dtype != spec.dtype:
            return f"dtype {spec.dtype} with a {spec.kv_dtype} cache is neither bfloat16 nor float16"
        if spec.has_sinks:
            return "it has no attention sinks"
        if spec.head_dim not in _HEAD_DIMS:
            return f"head size {spec.head_dim} is not one of 64, 128, 256"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} KV heads"
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[N, 2, G, P, D]``."""
        return (num_blocks, 2, self._spec.num_kv_heads, self._spec.block_size, self._spec.head_dim)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> FlashInferMetadata:
        """See AttentionBackend."""
        del query_start_loc, seq_lens  # the step has them as integers
        device = block_table.device
        if self._decode is None:
            self._make_wrappers(device)
        starts = [0]
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        calls: list[FlashInferCall] = []
        decodes = [row for row, count in enumerate(step.query_lens) if count == 1]
        prompts = [row for row, count in enumerate(step.query_lens) if count > 1]
        for rows, wrapper in ((decodes, self._decode), (prompts, self._prefill)):
            if not rows:
                continue
            self._plan_wrapper(wrapper, step, rows, block_table)
            tokens = torch.tensor([t for row in rows for t in range(starts[row], starts[row + 1])])
            calls.append(FlashInferCall(tokens.to(device, non_blocking=True), wrapper))
        return FlashInferMetadata(slot_mapping, block_table, step.num_tokens, calls)

    def kv_views(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """See AttentionBackend."""
        return cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)

    def write(self, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata) -> None:
        """See AttentionBackend. Padding writes back what slot 0, of the null block, holds."""
        page, at = self._spec.block_size, meta.slot_mapping.clamp_min(0)
        is_real = (meta.slot_mapping >= 0)[:, None, None]
        for index, new in enumerate((k, v)):
            old = cache[at // page, index, :, at % page]
            cache[at // page, index, :, at % page] = torch.where(is_real, new.to(cache.dtype), old)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
        """See AttentionBackend."""
        del k, v  # read from the cache
        assert isinstance(meta, FlashInferMetadata)
        if meta.num_tokens < len(out):
            out[meta.num_tokens :].zero_()
        for call in meta.calls:
            out[call.tokens] = call.wrapper.run(q[call.tokens], cache)

    def _make_wrappers(self, device: torch.device) -> None:
        library: Any = importlib.import_module("flashinfer")
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Tensor cores pay for decode too once several query heads share a KV head.
        use_tensor_cores = self._spec.num_heads > self._spec.num_kv_heads
        self._decode = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="HND", use_tensor_cores=use_tensor_cores
        )
        self._prefill = library.BatchPrefillWithPagedKVCacheWrapper(torch.empty_like(workspace), kv_layout="HND")

    def _plan_wrapper(self, wrapper: Any, step: StepShape, rows: Sequence[int], block_table: Tensor) -> None:
        spec, page, device = self._spec, self._spec.block_size, block_table.device
        lens = [step.seq_lens[row] for row in rows]
        counts = [-(-length // page) for length in lens]
        # Entries of the table that are in use, in the order of the requests.
        places = torch.tensor([row * block_table.shape[1] + column for row, count in zip(rows, counts, strict=True)
                               for column in range(count)])  # fmt: skip
        indices = block_table.contiguous().flatten()[places.to(device, non_blocking=True)].int()
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        last = torch.tensor([length - (count - 1) * page for length, count in zip(lens, counts, strict=True)]).int()
        common = {
            "sm_scale": spec.scale, "logits_soft_cap": spec.logit_softcap, "q_data_type": spec.dtype,
            "kv_data_type": spec.kv_dtype,
            "window_left": -1 if spec.sliding_window is None else spec.sliding_window - 1,
        }  # fmt: skip
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim, page)
        if wrapper is self._decode:
            wrapper.plan(indptr, indices, last, *heads, **common)
            return
        queries = torch.tensor([0, *(step.query_lens[row] for row in rows)]).cumsum(0).int()
        wrapper.plan(queries, indptr, indices, last, *heads, causal=True, **common)


def _has_compiler() -> bool:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or Path(home, "bin", "nvcc").exists()

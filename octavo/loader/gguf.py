"""Weights from a GGUF file: Hugging Face names, blocks turned into floats slice by slice while loading.

Blocks are decoded by the ``gguf`` package, which is the reference for every type; a few threads decode ahead of the
consumer (NumPy releases the interpreter lock). Knows no model: the one thing that differs between architectures is that
Llama's files store query and key rows in another order, see ``_unpermute``.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from octavo.checkpoint.gguf_file import GGUFFile, GGUFTensor
from octavo.errors import CheckpointError
from octavo.loader.safetensors import drop_pages
from octavo.loader.source import LoadRequest, RowSlice

_SLICE_VALUES = 1 << 18
"""Values decoded at once: one megabyte of float32, which stays in a core's cache."""
_MAX_THREADS = 4
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")
NOT_WEIGHTS = frozenset({"rope_freqs.weight"})
"""Read with the config."""
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; one that is not known keeps its own."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP and kind in ("weight", "bias"):
        return f"{_TOP[stem]}.{kind}"
    match = _BLOCK_NAME.fullmatch(name)
    if match and match.group(2) in _BLOCK:
        return f"model.layers.{match.group(1)}.{_BLOCK[match.group(2)]}.{match.group(3)}"
    return name


class GGUFSource:
    """Yields the tensors of a GGUF file in the order of their bytes."""

    def __init__(self, request: LoadRequest) -> None:
        self._path = request.load_config.path
        self._config = request.model_config

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource."""
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        with GGUFFile(self._path) as gguf, ThreadPoolExecutor(num_threads, "gguf-decode") as pool:
            chosen = [t for t in gguf.tensors.values() if t.name not in NOT_WEIGHTS and wanted(hf_name(t.name))]
            jobs = [job for t in sorted(chosen, key=lambda t: t.offset) for job in self._jobs(gguf, t)]
            ahead: deque[tuple[_Job, Future[Tensor]]] = deque()
            try:
                for job in jobs:
                    ahead.append((job, pool.submit(_decode, gguf, job)))
                    if len(ahead) > 2 * num_threads:
                        yield _result(*ahead.popleft())
                while ahead:
                    yield _result(*ahead.popleft())
            finally:
                for _, future in ahead:
                    future.cancel()

    def _jobs(self, gguf: GGUFFile, tensor: GGUFTensor) -> Iterator[_Job]:
        """Cut a tensor into slices; those of permuted queries and keys hold whole heads."""
        num_heads = self._permuted_heads(gguf, tensor.name)
        rows = tensor.shape[0]
        if num_heads and rows != num_heads * self._config.head_dim:
            raise CheckpointError(
                self._path,
                f"has {rows} rows, but the header speaks of {num_heads} heads of {self._config.head_dim}",
                tensor=tensor.name,
            )
        if len(tensor.shape) == 1:
            yield _Job(tensor, 0, rows, num_heads)
            return
        row_values = math.prod(tensor.shape[1:])
        unit = self._config.head_dim if num_heads else 1
        step = max(1, _SLICE_VALUES // (row_values * unit)) * unit
        for start in range(0, rows, step):
            end = min(start + step, rows)
            yield _Job(tensor, start, end, (end - start) // unit if num_heads else 0)

    def _permuted_heads(self, gguf: GGUFFile, name: str) -> int:
        """Heads in a query or key projection whose rows are interleaved; 0 for every other tensor."""
        if gguf.metadata.get("general.architecture") != "llama":
            return 0
        if ".attn_q." in name:
            return self._config.num_heads
        return self._config.num_kv_heads if ".attn_k." in name else 0


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows ``start`` to ``end`` of a tensor, along its first dimension."""

    tensor: GGUFTensor
    start: int
    end: int
    num_permuted_heads: int


def _decode(gguf: GGUFFile, job: _Job) -> Tensor:
    tensor = job.tensor
    if len(tensor.shape) == 1:
        first, last, shape = 0, 1, tensor.shape
    else:
        rows_per_index = math.prod(tensor.shape[1:-1])
        first, last = job.start * rows_per_index, job.end * rows_per_index
        shape = (job.end - job.start, *tensor.shape[1:])
    raw = gguf.read(tensor, first, last)
    drop_pages(gguf.map, tensor.offset + first * tensor.row_bytes, len(raw))
    if tensor.quant_type in _TORCH_TYPES:
        values = torch.frombuffer(bytearray(raw), dtype=_TORCH_TYPES[tensor.quant_type])
    else:
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(last - first, tensor.row_bytes)
        values = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.quant_type]))
    values = values.view(shape)
    return _unpermute(values, job.num_permuted_heads) if job.num_permuted_heads else values


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from pairs ``(0, D/2), (1, D/2 + 1), ...`` side by side back to halves.

    llama.cpp rotates neighbouring values, Hugging Face values half a head apart; its converter reorders Llama's rows.
    """
    pairs = values.view(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _result(job: _Job, future: Future[Tensor]) -> tuple[str, Tensor | RowSlice]:
    values = future.result()
    name = hf_name(job.tensor.name)
    if len(job.tensor.shape) == 1:
        return name, values
    return name, RowSlice(values, job.start, job.tensor.shape[0])

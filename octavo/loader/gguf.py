"""Weights from a GGUF file: Hugging Face names, blocks turned into floats slice by slice while loading.

A few threads decode ahead of the consumer, without the interpreter lock; see ``gguf_blocks.py``. What a tensor is
called and how its rows lie in each architecture is in ``gguf_names.py``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.checkpoint.gguf_file import GGUFFile, GGUFTensor
from octavo.config.model import ModelConfig
from octavo.loader.gguf_blocks import dequantize
from octavo.loader.gguf_names import NOT_WEIGHTS, Part, layout_of, parts
from octavo.loader.source import LoadRequest, RowSlice

_SLICE_VALUES = 1 << 18
"""Values decoded at once: one megabyte of float32, which stays in a core's cache."""
_MAX_THREADS = 4
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_parts(gguf: GGUFFile, config: ModelConfig) -> list[tuple[GGUFTensor, Part]]:
    """All weights of a file in the order of their bytes, with what they are in Hugging Face's checkpoint.

    Raises:
        CheckpointError: A tensor's shape does not fit what it should hold.
    """
    layout = layout_of(gguf.metadata)
    ordered = sorted((t for t in gguf.tensors.values() if t.name not in NOT_WEIGHTS), key=lambda t: (t.part, t.offset))
    found = [(tensor, part) for tensor in ordered for part in parts(tensor, layout, config, str(gguf.path))]
    # Some converters write a matrix whole and in pieces.
    whole = {part.name for _, part in found if not part.num_rows}
    return [(tensor, part) for tensor, part in found if not part.num_rows or part.name not in whole]


class GGUFSource:
    """Yields the tensors of a GGUF file in the order of their bytes."""

    def __init__(self, request: LoadRequest) -> None:
        self._path = request.load_config.path
        self._config = request.model_config

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource. What is yielded lies in the file or in memory that is used again."""
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        with (
            GGUFFile(self._path, strings=()) as gguf,
            ThreadPoolExecutor(num_threads, "gguf-decode") as pool,
        ):
            chosen = [(tensor, part) for tensor, part in gguf_parts(gguf, self._config) if wanted(part.name)]
            jobs = [job for tensor, part in chosen for job in _jobs(tensor, part)]
            largest = max((job.num_values for job in jobs if job.tensor.quant_type not in _TORCH_TYPES), default=0)
            # One buffer more than slices are ahead: the consumer's own.
            buffers = itertools.cycle([torch.empty(largest) for _ in range(2 * num_threads + 1)])
            ahead: deque[tuple[_Job, Future[Tensor]]] = deque()
            try:
                for job in jobs:
                    ahead.append((job, pool.submit(_decode, gguf, job, next(buffers))))
                    if len(ahead) == 2 * num_threads:
                        yield from _finish(gguf, *ahead.popleft())
                while ahead:
                    yield from _finish(gguf, *ahead.popleft())
            finally:
                for _, future in ahead:
                    future.cancel()


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows ``start`` to ``end`` of a part, along its first dimension."""

    tensor: GGUFTensor
    part: Part
    start: int
    end: int

    @property
    def rows(self) -> tuple[int, int]:
        """First row in the tensor, seen as ``[rows, shape[-1]]``, and the one behind the last."""
        if len(self.tensor.shape) == 1:
            return 0, 1
        if len(self.part.shape) == 1:
            return self.part.start, self.part.start + 1
        if self.part.is_transposed:
            return self.part.start, self.part.start + self.part.shape[1]
        rows_per_index = math.prod(self.part.shape[1:-1])
        return self.part.start + rows_per_index * self.start, self.part.start + rows_per_index * self.end

    @property
    def num_values(self) -> int:
        """Of these rows."""
        first, last = self.rows
        return (last - first) * self.tensor.shape[-1]


def _jobs(tensor: GGUFTensor, part: Part) -> Iterator[_Job]:
    """Cut a part into slices; those of permuted queries and keys hold whole heads."""
    rows = part.shape[0]
    if len(part.shape) == 1 or part.is_transposed:
        yield _Job(tensor, part, 0, rows)
        return
    unit = rows // part.num_permuted_heads if part.num_permuted_heads else 1
    step = max(1, _SLICE_VALUES // (math.prod(part.shape[1:]) * unit)) * unit
    for start in range(0, rows, step):
        yield _Job(tensor, part, start, min(start + step, rows))


def _decode(gguf: GGUFFile, job: _Job, buffer: Tensor) -> Tensor:
    """The values of a slice: in the file, where they lie there as they are, else in ``buffer`` or memory of its own."""
    tensor, part = job.tensor, job.part
    raw = gguf.view(tensor, *job.rows)
    if tensor.quant_type in _TORCH_TYPES:
        values = torch.frombuffer(raw, dtype=_TORCH_TYPES[tensor.quant_type])
    else:
        values = dequantize(raw, tensor, lambda size: buffer[:size])
    if len(tensor.shape) == 1:
        values = values[part.start : part.start + math.prod(part.shape)]
    if part.is_transposed:
        return values.view(part.shape[::-1]).t()
    values = values.view(job.end - job.start, *part.shape[1:])
    if part.added:
        values = values - part.added
    num_heads = part.num_permuted_heads * (job.end - job.start) // part.shape[0]
    return _unpermute(values, num_heads) if num_heads else values


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from pairs ``(0, D/2), (1, D/2 + 1), ...`` side by side back to halves.

    llama.cpp rotates neighbouring values of these models, Hugging Face values half a head apart.
    """
    pairs = values.view(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _finish(gguf: GGUFFile, job: _Job, future: Future[Tensor]) -> Iterator[tuple[str, Tensor | RowSlice]]:
    """Yield the slice, and give its pages of the file back once it has been taken."""
    part = job.part
    values = future.result()
    yield part.name, values if len(part.shape) == 1 else RowSlice(values, part.row + job.start, part.full_shape[0])
    gguf.drop(job.tensor, *job.rows)

"""Random weights with the right shapes: for tests and speed measurements without a checkpoint.

The same seed and name give the same values, whatever else is loaded. Matrices have the variance that keeps activations
near unit size (1 / columns), vectors lie near 1 (norms) or 0 (biases). Numbers are drawn once and handed out
cyclically from a place that depends on the name, since drawing billions of them would take minutes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from octavo.loader.source import SLICE_BYTES, LoadRequest, RowSlice

_POOL = 1_048_573
"""Values drawn; prime, so that rows of usual widths do not repeat one another."""


class DummySource:
    """Yields every tensor that the model expects."""

    def __init__(self, request: LoadRequest) -> None:
        self._expected = request.expected
        self._seed = request.load_config.seed
        self._device = request.device

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource."""
        generator = torch.Generator().manual_seed(self._seed)
        # Drawn on the host, so that they do not depend on the device; handed out from there to spare the bus.
        pool = torch.randn(_POOL, generator=generator).to(self._device)
        scaled: dict[int, Tensor] = {}
        for name, shape in self._expected.items():
            if not wanted(name):
                continue
            start = zlib.crc32(name.encode()) % _POOL
            if len(shape) == 1:
                values = _cyclic(pool, start, shape[0]) * 0.02
                yield name, values if name.endswith("bias") else values + 1.0
                continue
            row_size = math.prod(shape[1:])
            if row_size not in scaled:
                scaled[row_size] = (pool * row_size**-0.5).repeat(2)
            rows = max(1, SLICE_BYTES // 4 // row_size)
            for row in range(0, shape[0], rows):
                count = min(rows, shape[0] - row)
                values = _cyclic(scaled[row_size], (start + row * row_size) % _POOL, count * row_size)
                yield name, RowSlice(values.view(count, *shape[1:]), row, shape[0])


def _cyclic(pool: Tensor, start: int, count: int) -> Tensor:
    """``count`` values from ``start`` on, going round; a view where that is possible."""
    if start + count <= len(pool):
        return pool[start : start + count]
    return pool[torch.arange(start, start + count, device=pool.device) % _POOL]

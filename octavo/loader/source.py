"""WeightSource: where tensors come from. See docs/extending/weight-source.md; ``dummy.py`` is the smallest.

A source knows a file format and Hugging Face's names of tensors; it knows no model, no fused parameter and no device:
``mapping.py`` puts what it yields into place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.config.model import ModelConfig
from octavo.config.sections import LoadConfig

SLICE_BYTES = 4 << 20
"""What a source should hold at once beside the file itself: larger tensors go out as ``RowSlice``."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows ``row_start`` to ``row_start + tensor.shape[0]`` of a tensor whose first dimension is ``num_rows``."""

    tensor: Tensor
    row_start: int
    num_rows: int

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the tensor that this is a part of."""
        return (self.num_rows, *self.tensor.shape[1:])


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What every source is constructed with: ``Source(request)``."""

    load_config: LoadConfig
    model_config: ModelConfig
    expected: Mapping[str, tuple[int, ...]]
    """Checkpoint name to shape of everything that the model needs."""
    device: torch.device = torch.device("cpu")
    """Where the parameters are. A source may yield tensors there or on the host."""


class WeightSource(Protocol):
    """Yields checkpoint tensors under Hugging Face names, one at a time, so that peak memory stays near the weights."""

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """Yield ``(name, tensor)`` for every wanted name, or several ``(name, RowSlice)`` that together give all rows.

        Every name that the checkpoint holds has to be asked about: ``wanted`` is also what notices unexpected ones.
        A tensor may be a view of a mapped file, valid until the next one is asked for.

        Raises:
            CheckpointError: A file is truncated or lies; names file, tensor and reason.
        """
        ...

"""WeightSource: where tensors come from. See docs/extending/weight-source.md; ``dummy.py`` is the smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """Yields checkpoint tensors under Hugging Face names, one at a time, so that peak memory stays near the weights."""

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` for every wanted name. The tensor may be a view of a mapped file, valid until the
        next one is asked for. A tensor too large to convert at once may be yielded in row slices: see ``RowSlice``.

        Raises:
            CheckpointError: A file is truncated or lies; names file, tensor and reason.
        """
        ...

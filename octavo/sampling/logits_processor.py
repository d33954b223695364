"""LogitsProcessor: change logits before the draw. See docs/extending/logits-processor.md."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from octavo.messages import ResolvedSampling


class LogitsProcessor(Protocol):
    """Batch-wise, stateful per row, never synchronising with the device."""

    keeps_argmax: ClassVar[bool]
    """Never changes the most likely token: skipped when all its rows are greedy."""

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> bool:
        """A request takes ``row``. ``token_ids`` is all that is known: the prompt, and outputs kept across a
        preemption. Return False when this request does not need the processor."""
        ...

    def remove(self, row: int) -> None:
        """The row is free again. Called only for rows that ``add`` accepted."""
        ...

    def apply(self, logits: Tensor, rows: Tensor) -> None:
        """Change ``logits`` ``[L, V]`` float32 in place; ``rows`` ``[L]`` int64 tells whose they are. Only rows that
        ``add`` accepted are passed."""
        ...

"""LogitsProcessor: change logits before the draw. See docs/extending/logits-processor.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from octavo.messages import ResolvedSampling


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """What a processor is constructed with: sizes, and the live token histories of all rows."""

    vocab_size: int
    max_num_seqs: int
    """Rows are numbered from 0 to below this."""
    device: torch.device
    token_ids: Tensor
    """``[max_num_seqs, max_model_len + 1]`` int32 on the device: prompt and output of each row. Read only."""
    num_tokens: Tensor
    """``[max_num_seqs]`` int64 on the device: known tokens of each row that draws in this step, while ``apply`` runs.
    Written by the sampler, only where there are processors."""


class LogitsProcessor(Protocol):
    """Batch-wise, stateful per row, never synchronising with the device."""

    keeps_argmax: ClassVar[bool]
    """Never changes the most likely token: not called for greedy rows. Runs after the temperature, all others before
    the penalties."""

    def __init__(self, context: ProcessorContext) -> None: ...

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> bool:
        """A request takes ``row``. ``token_ids`` is all that is known: the prompt, and outputs kept across a
        preemption. Return False when this request does not need the processor. Raise to fail this request alone."""
        ...

    def remove(self, row: int) -> None:
        """The row is free again. Called only for rows that ``add`` accepted."""
        ...

    def apply(self, logits: Tensor, rows: Tensor) -> None:
        """Change ``logits`` ``[L, V]`` float32 in place; ``rows`` ``[L]`` int64 tells whose they are. Only rows that
        ``add`` accepted are passed. When it raises for several rows it is called again for each of them alone, with
        the logits as they were, so that only the rows that raise fail."""
        ...

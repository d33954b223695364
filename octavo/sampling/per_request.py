"""Lift a function of one request's tokens and logits to the batch protocol of LogitsProcessor.

The simple way to change logits: one call per row and step, with the tokens so far on the host. That waits for the
device at every step; a processor that must be fast implements the protocol itself. Knows no sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from octavo.messages import ResolvedSampling
from octavo.sampling.logits_processor import ProcessorContext

LogitsFunction = Callable[[list[int], Tensor], Tensor]
"""``(token_ids, logits [V] float32) -> logits [V]``; ``token_ids`` is the prompt and the output so far."""


class PerRequestProcessor:
    """Base for processors that are a function per request: implement ``make`` and name the class at start-up."""

    keeps_argmax: ClassVar[bool] = False

    def __init__(self, context: ProcessorContext) -> None:
        self._context = context
        self._functions: dict[int, LogitsFunction] = {}

    def make(self, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> LogitsFunction | None:
        """The function for a request, usually decided by ``sampling.extra_args``; None when it needs none."""
        raise NotImplementedError

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> bool:
        """See LogitsProcessor."""
        function = self.make(sampling, token_ids, num_prompt_tokens)
        if function is None:
            return False
        self._functions[row] = function
        return True

    def remove(self, row: int) -> None:
        """See LogitsProcessor."""
        del self._functions[row]

    def apply(self, logits: Tensor, rows: Tensor) -> None:
        """See LogitsProcessor."""
        lengths = self._context.num_tokens[rows].tolist()
        for i, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
            token_ids = self._context.token_ids[row, :length].tolist()
            logits[i] = self._functions[row](token_ids, logits[i])

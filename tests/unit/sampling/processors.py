"""Processors that tests name by import path."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from octavo.messages import ResolvedSampling
from octavo.sampling.logits_processor import ProcessorContext


class RaisesOnDemand:
    """``extra_args={"raise": "add" | "apply" | "never"}``; else adds 100 to token 0."""

    keeps_argmax: ClassVar[bool] = False

    def __init__(self, context: ProcessorContext) -> None:
        self.broken: set[int] = set()

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> bool:
        when = (sampling.extra_args or {}).get("raise")
        if when == "add":
            raise RuntimeError("boom in add")
        if when == "apply":
            self.broken.add(row)
        return when is not None

    def remove(self, row: int) -> None:
        self.broken.discard(row)

    def apply(self, logits: Tensor, rows: Tensor) -> None:
        logits[:, 0] += 100
        if self.broken.intersection(rows.tolist()):
            raise RuntimeError("boom in apply")


class Sharpens:
    """Multiplies the distance to the best logit: never changes which is the best."""

    keeps_argmax: ClassVar[bool] = True

    def __init__(self, context: ProcessorContext) -> None:
        self.seen: list[list[int]] = []

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> bool:
        return bool(sampling.extra_args)

    def remove(self, row: int) -> None:
        pass

    def apply(self, logits: Tensor, rows: Tensor) -> None:
        self.seen.append(rows.tolist())
        best = logits.amax(dim=1, keepdim=True)
        logits.sub_(best).mul_(1000.0).add_(best)

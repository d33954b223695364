"""A sampler with rows that hold texts, without worker or model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.messages import ResolvedSampling
from octavo.sampling.logits_processor import ProcessorContext
from octavo.sampling.sampler import Sampler, SamplerOutput

MAX_LEN = 96


def sampling(**fields: object) -> ResolvedSampling:
    """Greedy with seed 1 unless told otherwise."""
    return ResolvedSampling(**{"max_tokens": 64, "seed": 1, "temperature": 0.0, **fields})  # type: ignore[arg-type]


def make_context(vocab_size: int, num_rows: int = 16) -> ProcessorContext:
    return ProcessorContext(
        vocab_size=vocab_size,
        max_num_seqs=num_rows,
        device=torch.device("cpu"),
        token_ids=torch.zeros((num_rows, MAX_LEN), dtype=torch.int32),
        num_tokens=torch.zeros(num_rows, dtype=torch.int64),
    )


class Bench:
    """Rows and their sampler."""

    def __init__(self, vocab_size: int, mode: str = "raw_logprobs", processors: Sequence[type] = ()) -> None:
        self.context = make_context(vocab_size)
        self.sampler = Sampler(self.context, mode, [processor(self.context) for processor in processors])

    def add(self, row: int, params: ResolvedSampling, prompt: list[int], output: Sequence[int] = ()) -> None:
        """A request with a text; ``output`` is what it kept across a preemption."""
        tokens = [*prompt, *output]
        self.sampler.add(row, params, tokens, len(prompt))
        self.write(row, tokens)

    def write(self, row: int, tokens: list[int]) -> None:
        # Rows are reused: what is left of an older text must not matter.
        self.context.token_ids[row] = torch.randint(0, self.context.vocab_size, (MAX_LEN,))
        self.context.token_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.context.num_tokens[row] = len(tokens)

    def sample(self, logits: torch.Tensor, rows: list[int], mask: torch.Tensor | None = None) -> SamplerOutput:
        """Draw; the texts are not changed. ``logits`` is kept."""
        lengths = self.context.num_tokens[rows]
        return self.sampler.sample(logits.clone(), np.array(rows), lengths, int(lengths.max()), mask)

    def append(self, rows: list[int], tokens: torch.Tensor) -> None:
        """Put the drawn tokens behind the texts."""
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self.context.token_ids[row, self.context.num_tokens[row]] = token
            self.context.num_tokens[row] += 1

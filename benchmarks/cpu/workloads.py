"""The CPU workloads, as token ids and output lengths of SmolLM2-135M. Standard library only: every engine runs it.

All engines get these very lists, decode greedily and ignore the end of sequence, so that each does the same work.
``tests/unit/benchmarks`` holds the digest of the lists: results of different days stay comparable.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

SEED = 0
TOKEN_IDS = (1000, 48000)
"""Half-open range of ordinary tokens of the vocabulary."""


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together."""

    description: str
    prompts: list[list[int]]
    output_lengths: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lengths)


def make_workloads() -> dict[str, Workload]:
    """C1, C2 and C3, always the same."""
    generator = random.Random(SEED)

    def prompt(num_tokens: int) -> list[int]:
        return [generator.randrange(*TOKEN_IDS) for _ in range(num_tokens)]

    # The order of the draws is part of the definition.
    single = prompt(128)
    batch_prompts: list[list[int]] = []
    batch_lengths: list[int] = []
    for _ in range(32):
        batch_prompts.append(prompt(generator.randint(64, 256)))
        batch_lengths.append(generator.randint(64, 128))
    long = prompt(2048)
    return {
        "C1": Workload("one request: 128 tokens in, 128 out", [single], [128]),
        "C2": Workload("32 requests at once: 64-256 tokens in, 64-128 out", batch_prompts, batch_lengths),
        "C3": Workload("one long prompt: 2048 tokens in, 1 out", [long], [1]),
    }


def digest(workloads: dict[str, Workload]) -> str:
    """SHA-256 over all prompts and lengths."""
    lists = [[name, w.prompts, w.output_lengths] for name, w in sorted(workloads.items())]
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()

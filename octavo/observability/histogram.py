"""Distributions as counts per bucket: cheap to add to, exact to merge. Knows no names and no Prometheus.

Observing costs a binary search in a short list and two additions: it is done for every step of the engine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS_TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
SECONDS_PER_TOKEN = (
    0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
SECONDS_PER_REQUEST = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
SECONDS_OF_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKENS_PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS_PER_REQUEST = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000,
)  # fmt: skip
ANSWERS_PER_REQUEST = (1, 2, 5, 10, 20)


class HistogramState:
    """Counts of values by upper bound.

    Args:
        bounds: Rising upper bounds; a value equal to one is counted under it. What is above the last has a bucket of
            its own.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    @property
    def num_values(self) -> int:
        """How many were observed."""
        return sum(self.counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def merge(self, counts: Sequence[int], total: float) -> None:
        """Add what another histogram with the same bounds has counted."""
        assert len(counts) == len(self.counts), (len(counts), len(self.counts))
        for index, count in enumerate(counts):
            self.counts[index] += count
        self.total += total

    def copy(self) -> HistogramState:
        """A copy that later observations do not change."""
        twin = HistogramState(self.bounds)
        twin.merge(self.counts, self.total)
        return twin

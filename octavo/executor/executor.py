"""Worker and Executor: what computes a step, and what carries the plan there. The seam for the fake worker too."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from octavo.messages import ModelRunnerOutput, SchedulerOutput
from octavo.worker.report import MemoryReport

__all__ = ["Executor", "MemoryReport", "Worker"]


class Worker(Protocol):
    """One device."""

    def load(self) -> MemoryReport: ...

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache. Block 0 is the null block: never read for its content, never written."""
        ...

    def warm_up(self) -> bool:
        """The first call: what the first request must not pay for. Any further one comes while there are no requests,
        and does one piece, of well under a second, of what makes later steps faster. Whether there is more to do."""
        ...

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        """Queue a step. Steps run strictly in the order of these calls."""
        ...

    def sample(self, step_id: int, mask: bytes | None) -> None:
        """Complete a step whose plan said ``defer_sampling``."""
        ...


class Executor(Protocol):
    """The same verbs over one or many workers."""

    def start(self) -> MemoryReport:
        """Load everywhere; the smallest report of all workers."""
        ...

    def allocate(self, num_blocks: int) -> None: ...

    def warm_up(self) -> bool: ...

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]: ...

    def sample(self, step_id: int, mask: bytes | None) -> None: ...

    def shutdown(self) -> None: ...

"""The executor of one device: the worker lives in the engine's own process and is called directly.

Knows nothing of models or devices; whatever speaks the Worker protocol will do, which is how tests put a fake device
behind the real scheduler. Executors are chosen by name in ``executor/registry.py``.
"""

from __future__ import annotations

from concurrent.futures import Future

from octavo.executor.executor import MemoryReport, Worker
from octavo.messages import ModelRunnerOutput, SchedulerOutput


class InlineExecutor:
    """One worker, called directly.

    Args:
        worker: Not loaded yet; ``start`` does that.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def start(self) -> MemoryReport:
        return self._worker.load()

    def allocate(self, num_blocks: int) -> None:
        self._worker.allocate(num_blocks)

    def warm_up(self) -> bool:
        return self._worker.warm_up()

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        return self._worker.forward(plan, mask)

    def sample(self, step_id: int, mask: bytes | None) -> None:
        self._worker.sample(step_id, mask)

    def shutdown(self) -> None:
        """Nothing to end: the worker goes with this process."""

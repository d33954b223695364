"""An executor without a model, so that what is measured is everything around one: scheduler, sockets, HTTP, text.

    PYTHONPATH=benchmarks/server FAKE_STEP_MS=10 octavo serve smollm2-135m \\
        --distributed-executor-backend fake_executor:FakeExecutor

Scheduler, KV cache, processes, tokenizer and server are the real ones. A step takes ``FAKE_STEP_MS`` milliseconds, or
``FAKE_JOIN_MS`` when a request joins in it, whatever its size. Tokens are those of ``FAKE_TOKEN_IDS``, in turn: choose
whole words, for of a part of a character nothing can be shown.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future

from octavo.config.engine import EngineConfig
from octavo.kv_spec import KVCacheSpec, KVGroupSpec, KVKind
from octavo.messages import ModelRunnerOutput, SchedulerOutput
from octavo.worker.report import MemoryReport

KV_BYTES = 2**40
"""The cache is bookkeeping only. At 4 KiB per token a CPU's default of 4 GiB is a million tokens."""


class FakeExecutor:
    """See ``octavo.executor.executor.Executor``.

    Args:
        config: Of the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        group = KVGroupSpec(KVKind.FULL, (0,), 1, 512, 4)
        self._spec = KVCacheSpec((group,), config.cache.block_size)
        self._step_s = float(os.environ.get("FAKE_STEP_MS", "10")) / 1000
        self._join_s = float(os.environ.get("FAKE_JOIN_MS", self._step_s * 1000)) / 1000
        self._ids = [int(each) for each in os.environ.get("FAKE_TOKEN_IDS", "100").split(",")]
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}

    def start(self) -> MemoryReport:
        return MemoryReport(self._spec, 0, 0, KV_BYTES, "none", "there is no model", 0.0)

    def allocate(self, num_blocks: int) -> None: ...

    def warm_up(self) -> bool:
        return False

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        assert mask is None
        begin_s = time.monotonic()
        for new in plan.new_rows:
            self._known[new.row], self._computed[new.row] = len(new.token_ids), new.num_computed_tokens
        token_ids: list[list[int]] = []
        for row, count in zip(plan.rows, plan.num_scheduled_tokens, strict=True):
            self._computed[row] += count
            if self._computed[row] < self._known[row]:
                token_ids.append([])
                continue
            self._known[row] += 1
            token_ids.append([self._ids[(self._known[row] + row) % len(self._ids)]])
        wait_s = (self._join_s if plan.new_rows else self._step_s) - (time.monotonic() - begin_s)
        if wait_s > 0:
            time.sleep(wait_s)
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(ModelRunnerOutput(plan.step_id, token_ids, forward_ms=(time.monotonic() - begin_s) * 1000))
        return future

    def sample(self, step_id: int, mask: bytes | None) -> None:  # noqa: ARG002
        raise AssertionError("no plan here defers its sampling")

    def shutdown(self) -> None: ...

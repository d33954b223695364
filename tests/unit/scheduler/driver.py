"""A scheduler with a fake worker and a hand-held loop, for tests that look at single steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from octavo.messages import EngineCoreOutput, EngineCoreRequest, ModelRunnerOutput, ResolvedSampling, SchedulerOutput
from octavo.scheduler.scheduler import Scheduler
from tests.simulation.configs import cache_config, kv_spec, scheduler_config
from tests.simulation.fake_worker import FakeWorker

BLOCK_SIZE = 4


class Driver:
    """``plan`` and ``apply`` are the two halves of a step; ``step`` does both."""

    def __init__(
        self,
        num_blocks: int = 100,
        *,
        windows: Sequence[int | None] = (None,),
        prefix_caching: bool = True,
        **changes: object,
    ) -> None:
        spec = kv_spec(BLOCK_SIZE, *windows)
        self.now_s = 100.0
        self.scheduler = Scheduler(
            scheduler_config(**changes),
            cache_config(BLOCK_SIZE, enable_prefix_caching=prefix_caching),
            spec,
            num_blocks,
            clock=lambda: self.now_s,
        )
        self.worker = FakeWorker(spec, vocab_size=1000)
        self.worker.allocate(num_blocks)
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.outputs: list[EngineCoreOutput] = []

    def add(self, request_id: str, prompt: int | list[int], max_tokens: int = 5, **fields: object) -> None:
        """A prompt given by length has tokens of its own."""
        own = 1000 * (1 + sum(request_id.encode()))
        token_ids = list(range(own, own + prompt)) if isinstance(prompt, int) else prompt
        names = {"tenant", "priority", "cache_salt", "lora_name", "resumption"}
        mine = {name: value for name, value in fields.items() if name in names}
        sampling = {name: value for name, value in fields.items() if name not in names}
        self.scheduler.add(
            EngineCoreRequest(
                request_id,
                token_ids,
                ResolvedSampling(max_tokens=max_tokens, seed=0, **sampling),  # type: ignore[arg-type]
                arrival_time_s=0.0,
                **mine,  # type: ignore[arg-type]
            )
        )

    def plan(self) -> SchedulerOutput | None:
        """Plan a step and give it to the worker."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append((plan, self.worker.forward(plan, None).result()))
        self.scheduler.check_books()
        return plan

    def apply(self) -> list[EngineCoreOutput]:
        """Apply the oldest result."""
        outputs = self.scheduler.update(*self.in_flight.popleft())
        self.outputs += outputs
        self.scheduler.check_books()
        return outputs

    def step(self) -> tuple[SchedulerOutput | None, list[EngineCoreOutput]]:
        plan = self.plan()
        return plan, self.apply() if self.in_flight else []

    def finish(self, max_steps: int = 1000) -> list[EngineCoreOutput]:
        """Step until all is done; all outputs so far."""
        for _ in range(max_steps):
            if not self.in_flight and not self.scheduler.has_admissible_work():
                return self.outputs
            self.step()
        raise AssertionError("not done")

    def tokens(self, request_id: str) -> list[int]:
        """What a request has produced so far."""
        return [t for output in self.outputs if output.request_id == request_id for t in output.new_token_ids]

"""How long the scheduler's own work takes per step: ``python -m tests.simulation.step_cost``.

Not a test: prints the processor time of ``schedule`` and ``update`` for steps in which every row decodes one token.
"""

from __future__ import annotations

import time
from collections import deque

from octavo.messages import EngineCoreRequest, ModelRunnerOutput, ResolvedSampling, SchedulerOutput
from octavo.scheduler.scheduler import Scheduler
from tests.simulation.configs import cache_config, kv_spec, scheduler_config

NUM_STEPS = 320
DEPTH = 2


def measure(policy: str, num_rows: int, num_prompt: int) -> str:
    """One line of results."""
    scheduler = Scheduler(
        scheduler_config(
            policy=policy,
            max_num_queued_tokens=10**9,
            max_model_len=16_384,
            max_num_seqs=num_rows,
            max_num_batched_tokens=num_rows * num_prompt,
        ),
        cache_config(16),
        kv_spec(16),
        num_blocks=1 + num_rows * (2 + (num_prompt + NUM_STEPS) // 16),
    )
    for index in range(num_rows):
        # Lengths differ, so that not all rows fill a block in the same step.
        prompt = [(index * 31 + position) % 50_000 for position in range(num_prompt - index % 16)]
        sampling = ResolvedSampling(max_tokens=NUM_STEPS + 9, seed=0, eos_token_ids=[50_000])
        scheduler.add(EngineCoreRequest(f"request-{index}", prompt, sampling, 0.0, tenant=f"tenant-{index % 4}"))
    in_flight: deque[SchedulerOutput] = deque()
    schedule_us: list[float] = []
    update_us: list[float] = []
    for _ in range(NUM_STEPS):
        start_s = time.thread_time()
        plan = scheduler.schedule()
        schedule_us.append(1e6 * (time.thread_time() - start_s))
        assert plan is not None and len(plan.rows) == num_rows
        in_flight.append(plan)
        if len(in_flight) == DEPTH:
            plan = in_flight.popleft()
            result = ModelRunnerOutput(plan.step_id, [[5] for _ in plan.rows], forward_ms=1.0)
            start_s = time.thread_time()
            scheduler.update(plan, result)
            update_us.append(1e6 * (time.thread_time() - start_s))
    columns = [f"{policy:8} {num_rows:4} rows, prompts of {num_prompt:5}"]
    for name, times in (("schedule", sorted(schedule_us[8:])), ("update", sorted(update_us[8:]))):
        columns.append(f"{name} {times[len(times) // 2]:5.0f} us median, {times[len(times) * 9 // 10]:5.0f} us p90")
    return " | ".join(columns)


if __name__ == "__main__":
    for policy, num_rows, num_prompt in (("fcfs", 256, 128), ("fcfs", 256, 4096), ("fair", 256, 128), ("fcfs", 1, 128)):
        print(measure(policy, num_rows, num_prompt))

"""Thousands of random workloads through the real scheduler and loop: same tokens as alone, nothing leaked, no hang.

Red when: a rule of preemption is dropped, a block is freed, shared or hit wrongly, a late result is misapplied, a
counter drifts, or a request can starve. ``OCTAVO_SIMULATION_WORKLOADS`` sets how many workloads each loop runs;
``OCTAVO_SIMULATION_SEED`` where to begin.
"""

from __future__ import annotations

import os

import pytest

from octavo.messages import EngineSnapshot
from tests.simulation.harness import AdversarialLoop, EngineLoop, LoopClass, run_workload

NUM_WORKLOADS = int(os.environ.get("OCTAVO_SIMULATION_WORKLOADS", "500"))
FIRST_SEED = int(os.environ.get("OCTAVO_SIMULATION_SEED", "0"))


@pytest.mark.parametrize("loop_class", [EngineLoop, AdversarialLoop])
def test_random_workloads_equal_the_reference(loop_class: LoopClass) -> None:
    totals = EngineSnapshot(time_s=0.0)
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_WORKLOADS):
        snapshot = run_workload(seed, loop_class)
        totals.num_preemptions += snapshot.num_preemptions
        totals.prefix_hits += snapshot.prefix_hits
        totals.num_steps += snapshot.num_steps
        for reason, count in snapshot.finished.items():
            totals.finished[reason] = totals.finished.get(reason, 0) + count
    print(f"{NUM_WORKLOADS} workloads: {totals}")
    # The workloads must go on reaching what they are for.
    assert totals.num_preemptions > NUM_WORKLOADS
    assert totals.prefix_hits > NUM_WORKLOADS
    assert set(totals.finished) == {"stop", "length", "abort", "error", "repetition"}

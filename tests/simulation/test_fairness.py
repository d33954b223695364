"""Fair scheduling over the real loop: shares of served tokens, no hoarded credit, no capacity held back.

Red when the fair policy charges the wrong tenant or the wrong amount, or stops being the order of admission.
"""

from __future__ import annotations

import itertools
import random

import pytest

from octavo.messages import EngineCoreRequest, ResolvedSampling
from octavo.scheduler.scheduler import Scheduler
from tests.simulation.configs import cache_config, kv_spec, scheduler_config
from tests.simulation.fake_worker import FakeWorker
from tests.simulation.harness import EngineLoop

DEPTH = 2


class Service:
    """An engine for four requests at a time, and tenants that keep it supplied."""

    def __init__(self, policy: str = "fair", **changes: object) -> None:
        spec = kv_spec(4)
        num_blocks = 400
        self.scheduler = Scheduler(
            scheduler_config(policy=policy, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=100, **changes),
            cache_config(4),
            spec,
            num_blocks,
        )
        worker = FakeWorker(spec)
        worker.allocate(num_blocks)
        self.rng = random.Random(1)
        self.loop = EngineLoop(self.scheduler, worker, DEPTH, self.rng)
        self.ids = itertools.count()
        self.outstanding: dict[str, set[str]] = {}

    def send(self, tenant: str, *, num_prompt: int, num_output: int) -> None:
        request_id = f"{tenant}-{next(self.ids)}"
        self.outstanding.setdefault(tenant, set()).add(request_id)
        prompt = [self.rng.randrange(10_000) for _ in range(num_prompt)]
        sampling = ResolvedSampling(max_tokens=num_output, seed=0)
        self.loop.add(EngineCoreRequest(request_id, prompt, sampling, 0.0, tenant=tenant))

    def run(self, num_turns: int, keep: dict[str, tuple[int, int, int]]) -> dict[str, int]:
        """Turn the loop while each tenant keeps so many requests outstanding; tokens served to each meanwhile.

        Args:
            num_turns: How long.
            keep: Tenant to (outstanding requests, longest prompt, longest output).
        """
        before = self.scheduler.snapshot().tenant_tokens
        for _ in range(num_turns):
            for tenant, (count, num_prompt, num_output) in keep.items():
                while len(self.outstanding.get(tenant, ())) < count:
                    self.send(
                        tenant,
                        num_prompt=self.rng.randint(1, num_prompt),
                        num_output=self.rng.randint(1, num_output),
                    )
            self.loop.turn()
            for output in self.loop.outputs:
                if output.finish_reason is not None:
                    self.outstanding[output.request_id.split("-")[0]].discard(output.request_id)
            self.loop.outputs.clear()
        after = self.scheduler.snapshot().tenant_tokens
        return {tenant: count - before.get(tenant, 0) for tenant, count in after.items()}


@pytest.mark.parametrize("flood_shape", [(60, 30, 30), (60, 60, 5), (60, 2, 60)])
def test_two_backlogged_tenants_get_equal_shares_however_much_one_sends(flood_shape: tuple[int, int, int]) -> None:
    service = Service()
    served = service.run(4000, {"flood": flood_shape, "modest": (6, 20, 20)})
    share = served["modest"] / sum(served.values())
    assert share == pytest.approx(0.5, abs=0.025), served


def test_first_come_first_served_is_not_fair() -> None:
    """The measure tells the difference."""
    served = Service("fcfs").run(2000, {"flood": (60, 30, 30), "modest": (6, 20, 20)})
    assert served["modest"] / sum(served.values()) < 0.25


def test_weights_are_shares() -> None:
    service = Service(tenant_weights={"gold": 3.0})
    served = service.run(4000, {"gold": (8, 20, 20), "plain": (40, 20, 20)})
    assert served["gold"] / sum(served.values()) == pytest.approx(0.75, abs=0.025), served


def test_an_idle_tenant_does_not_hoard_credit() -> None:
    service = Service()
    service.run(500, {"a": (6, 20, 20), "b": (6, 20, 20)})
    service.run(1500, {"a": (6, 20, 20)})
    served = service.run(3000, {"a": (6, 20, 20), "b": (6, 20, 20)})
    assert served["b"] / sum(served.values()) == pytest.approx(0.5, abs=0.025), served


def test_a_tenant_alone_gets_everything() -> None:
    """Work conserving: as many tokens in as many turns as without fairness."""
    fair = Service("fair").run(800, {"only": (8, 30, 30)})
    fcfs = Service("fcfs").run(800, {"only": (8, 30, 30)})
    assert fair == fcfs

"""Who is served first and who gives way: first come, by priority, or fair between tenants.

A policy owns the waiting queue's order and nothing else: whether a request fits, and that it leaves the queue, is
decided in ``scheduler.py``. Third parties name theirs by import path; see docs/extending/scheduling-policy.md.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from octavo.config.sections import SchedulerConfig
from octavo.scheduler.request import Request
from octavo.utils.registry import Registry

_MAX_TENANTS = 4096
"""Counters kept by the fair policy; beyond this, tenants that do not wait are forgotten."""


class SchedulingPolicy(Protocol):
    """The order of waiting and running requests. Constructed with the ``SchedulerConfig``."""

    def add(self, request: Request) -> None:
        """The request waits now: it is new, or has been preempted (``num_preemptions`` has grown)."""
        ...

    def remove(self, request: Request) -> None:
        """It does not wait any more: admitted or aborted."""
        ...

    def peek(self) -> Request | None:
        """The waiting request to admit next; None when nobody waits. Asked again after each admission."""
        ...

    def rank(self, request: Request) -> tuple[int, ...]:
        """Place among the running, fixed while it runs: lower gets blocks first and is never preempted for a higher
        one. Equal ranks stand in the order of admission."""
        ...

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Whom of these to preempt. They are running, not in the plan being made, and in the order of their ranks."""
        ...

    def on_tokens(self, tenant: str, num_prompt: int, num_output: int) -> None:
        """Service given: prompt tokens that a first admission will compute (without cached ones, and not again after a
        preemption), or output tokens of a step."""
        ...


class FcfsPolicy:
    """First come, first served. Preempted requests, having come earlier, go first."""

    def __init__(self, config: SchedulerConfig) -> None:  # noqa: ARG002
        self._queue: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self._queue[request.request_id] = request
        if request.num_preemptions:
            # Victims of one step are taken from the newest on, so each goes before the one put back before it.
            self._queue.move_to_end(request.request_id, last=False)

    def remove(self, request: Request) -> None:
        del self._queue[request.request_id]

    def peek(self) -> Request | None:
        return next(iter(self._queue.values()), None)

    def rank(self, request: Request) -> tuple[int, ...]:
        return (request.arrival_index,)

    def victim(self, candidates: Sequence[Request]) -> Request:
        """The newest."""
        return candidates[-1]

    def on_tokens(self, tenant: str, num_prompt: int, num_output: int) -> None:
        """Nobody counts."""


class PriorityPolicy:
    """Lower ``priority`` first, equal ones by arrival."""

    def __init__(self, config: SchedulerConfig) -> None:  # noqa: ARG002
        self._queue: list[Request] = []

    def add(self, request: Request) -> None:
        insort(self._queue, request, key=self.rank)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._queue, self.rank(request), key=self.rank)
        assert self._queue[index] is request
        del self._queue[index]

    def peek(self) -> Request | None:
        return self._queue[0] if self._queue else None

    def rank(self, request: Request) -> tuple[int, ...]:
        return (request.priority, request.arrival_index)

    def victim(self, candidates: Sequence[Request]) -> Request:
        """The least important, of these the newest."""
        return candidates[-1]

    def on_tokens(self, tenant: str, num_prompt: int, num_output: int) -> None:
        """Nobody counts."""


class FairPolicy:
    """Equal service per tenant, or by weight, whoever sends more.

    Each tenant has a counter of tokens served divided by its weight; of the tenants that wait, the one with the
    smallest counter is next. A tenant that comes back after a pause starts no lower than those who have waited, so a
    pause earns no credit. No capacity is held back: a tenant alone gets everything.

    Paper: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (virtual token counter). Unlike there,
    prompt and output tokens cost the same and cached prompt tokens cost nothing.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._weights = config.tenant_weights
        self._counters: dict[str, float] = {}
        self._queues: dict[str, OrderedDict[str, Request]] = {}
        """Only tenants that wait."""
        self._preempted: OrderedDict[str, Request] = OrderedDict()
        self._last_counter = 0.0
        """Of the tenant that left the queue last: the level for a newcomer when nobody waits."""

    def add(self, request: Request) -> None:
        if request.num_preemptions:
            # Its prompt has been charged already: it goes on as soon as there is room.
            self._preempted[request.request_id] = request
            self._preempted.move_to_end(request.request_id, last=False)
            return
        tenant = request.tenant
        if tenant not in self._queues:
            level = min((self._counters[other] for other in self._queues), default=self._last_counter)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), level)
            self._queues[tenant] = OrderedDict()
        self._queues[tenant][request.request_id] = request

    def remove(self, request: Request) -> None:
        if self._preempted.pop(request.request_id, None) is not None:
            return
        queue = self._queues[request.tenant]
        del queue[request.request_id]
        if not queue:
            del self._queues[request.tenant]
            self._last_counter = max(self._last_counter, self._counters[request.tenant])
            if len(self._counters) > _MAX_TENANTS:
                self._forget_idle_tenants()

    def peek(self) -> Request | None:
        if self._preempted:
            return next(iter(self._preempted.values()))
        if not self._queues:
            return None
        first = [next(iter(queue.values())) for queue in self._queues.values()]
        return min(first, key=lambda request: (self._counters[request.tenant], request.arrival_index))

    def rank(self, request: Request) -> tuple[int, ...]:  # noqa: ARG002
        """All alike: the order of admission. Ranking by counter would make tenants push each other out in turns."""
        return ()

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Of the tenant served most, the newest."""
        most = max(self._counters.get(request.tenant, 0.0) for request in candidates)
        return max(
            (request for request in candidates if self._counters.get(request.tenant, 0.0) == most),
            key=lambda request: request.arrival_index,
        )

    def on_tokens(self, tenant: str, num_prompt: int, num_output: int) -> None:
        cost = (num_prompt + num_output) / self._weights.get(tenant, 1.0)
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost

    def _forget_idle_tenants(self) -> None:
        """Drop half of the counters of tenants that do not wait, the lowest: those say least about who is ahead."""
        idle = sorted(
            (tenant for tenant in self._counters if tenant not in self._queues), key=self._counters.__getitem__
        )
        for tenant in idle[: len(idle) // 2]:
            del self._counters[tenant]


POLICIES = Registry(
    "scheduling policy",
    "scheduling_policy",
    "octavo.scheduling_policies",
    {
        "fcfs": "octavo.scheduler.policy:FcfsPolicy",
        "priority": "octavo.scheduler.policy:PriorityPolicy",
        "fair": "octavo.scheduler.policy:FairPolicy",
    },
)


def make_policy(config: SchedulerConfig) -> SchedulingPolicy:
    """The policy that ``config.policy`` names.

    Raises:
        ConfigError: There is none of that name, or its import path leads nowhere.
    """
    policy: SchedulingPolicy = POLICIES.load(config.policy)(config)
    return policy

"""Books: which request is where, which rows are free, and the counters that people see.

Every change of a request's status is a method here, so that rows, blocks, queue and counters always move together.
Decides nothing: who runs is decided in ``scheduler.py``, who has finished in ``update.py``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from octavo.kv_cache.manager import KVCacheManager, PrefixHit
from octavo.messages import EngineSnapshot, FinishReason, RequestTimeline
from octavo.observability.histogram import TOKENS_PER_STEP
from octavo.observability.history import MAX_PREEMPTION_TIMES, RequestHistory, belongs_to, names_of
from octavo.scheduler.policy import SchedulingPolicy
from octavo.scheduler.request import Request, RequestStatus


@dataclass(slots=True)
class StepRecord:
    """What the core remembers of a plan until its result comes back. Parallel lists in batch order."""

    requests: list[Request]
    starts: list[int]
    """Position of the first token that the request runs in this step."""
    preemptions: list[int]
    """``num_preemptions`` when planned: if it has grown since, the step's KV is gone, but not its token."""


class Books:
    """The state shared by planning and updating.

    Attributes:
        running: Requests with a row, by the policy's rank.
        waiting: Requests without one, by id; their order is the policy's.
        in_flight: Plans not come back yet, by step id, in order.
        removed_rows: Rows given up since the last plan.
        counters: The growing numbers of ``EngineSnapshot``; its gauges are filled in by ``snapshot``.
    """

    def __init__(self, kv_cache: KVCacheManager, policy: SchedulingPolicy, max_num_rows: int) -> None:
        self.kv_cache = kv_cache
        self.policy = policy
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: dict[str, Request] = {}
        self.num_waiting_tokens = 0
        self.in_flight: dict[int, StepRecord] = {}
        self.removed_rows: list[int] = []
        self.counters = EngineSnapshot(time_s=0.0, step_sizes=[0] * (len(TOKENS_PER_STEP) + 1))
        self._history = RequestHistory()
        self._max_num_rows = max_num_rows
        self._free_rows = list(range(max_num_rows - 1, -1, -1))

    @property
    def has_free_row(self) -> bool:
        """Whether one more request could run."""
        return bool(self._free_rows)

    # ------------------------------------------------------------------------------------------- status, one by one

    def enqueue(self, request: Request) -> None:
        """New, or preempted: it waits now."""
        self.requests[request.request_id] = request
        self.waiting[request.request_id] = request
        self.num_waiting_tokens += len(request.token_ids)
        self.policy.add(request)

    def admit(self, request: Request, hit: PrefixHit, now_s: float) -> None:
        """Waiting to running: gets a row; its blocks have been started by the caller."""
        self._leave_queue(request)
        request.status = RequestStatus.RUNNING
        request.row = self._free_rows.pop()
        request.num_computed_tokens = hit.num_tokens
        insort(self.running, request, key=self.policy.rank)
        if request.timings.scheduled_s != 0.0:
            if len(request.timings.resumed_s) < MAX_PREEMPTION_TIMES:
                request.timings.resumed_s.append(now_s)
        else:
            request.timings.scheduled_s = now_s
            request.num_cached_tokens = hit.num_tokens
            if request.may_read_prefix_cache:
                self.counters.prefix_queries += request.num_prompt_tokens
                self.counters.prefix_hits += hit.num_tokens
            self.policy.on_tokens(request.tenant, request.num_prompt_tokens - hit.num_tokens, 0)

    def preempt(self, request: Request, now_s: float) -> None:
        """Running to waiting: row and blocks are given up, known tokens are kept and computed again."""
        if len(request.timings.preempted_s) < MAX_PREEMPTION_TIMES:
            request.timings.preempted_s.append(now_s)
        self._leave_device(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.enqueue(request)

    def finish(self, request: Request, reason: FinishReason, now_s: float) -> None:
        """Out of the books, from wherever it was; tokens in flight are dropped when they come back."""
        if reason is FinishReason.ERROR:
            # What made it fail (a NaN, say) may stand in its blocks: nobody else shall read them.
            self.kv_cache.distrust(request.blocks)
        if request.status is RequestStatus.RUNNING:
            self._leave_device(request)
        else:
            self._leave_queue(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.timings.num_preemptions = request.num_preemptions
        request.timings.finished_s = now_s
        del self.requests[request.request_id]
        finished = self.counters.finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
        self._history.add(_timeline(request))

    def _leave_queue(self, request: Request) -> None:
        del self.waiting[request.request_id]
        self.num_waiting_tokens -= len(request.token_ids)
        self.policy.remove(request)

    def _leave_device(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request.blocks)
        self.removed_rows.append(request.row)
        self._free_rows.append(request.row)
        request.row = -1

    # -------------------------------------------------------------------------------------------------------- numbers

    def count_step(self, num_tokens: int) -> None:
        """A step of so many tokens was planned."""
        counters = self.counters
        counters.num_steps += 1
        counters.scheduled_tokens += num_tokens
        counters.step_sizes[bisect_left(TOKENS_PER_STEP, num_tokens)] += 1

    def timeline(self, request_id: str) -> list[RequestTimeline]:
        """What became of a request: its sequences that have finished lately, then those in the books."""
        present = [_timeline(each) for each in self.requests.values() if belongs_to(each.request_id, request_id)]
        return self._history.find(request_id) + present

    def find(self, request_ids: Collection[str], tenant: str | None) -> dict[str, list[str]]:
        """Requests in the books by name: each name with its sequences. One look at each sequence, however many names.

        Args:
            request_ids: Names to look for; those that are not there are left out.
            tenant: Whose; None for anybody's.
        """
        wanted, found = set(request_ids), dict[str, list[str]]()
        for each in self.requests.values():
            if tenant is None or each.tenant == tenant:
                for name in names_of(each.request_id):
                    if name in wanted:
                        found.setdefault(name, []).append(each.request_id)
        return found

    def snapshot(self, now_s: float) -> EngineSnapshot:
        """A copy of the counters with the gauges of this moment."""
        return msgspec.structs.replace(
            self.counters,
            time_s=now_s,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=self.kv_cache.num_blocks,
            num_free_blocks=self.kv_cache.num_free_blocks,
            num_cached_blocks=self.kv_cache.num_cached_blocks,
            step_sizes=list(self.counters.step_sizes),
            finished=dict(self.counters.finished),
            tenant_tokens=dict(self.counters.tenant_tokens),
        )

    def check(self) -> None:
        """Every request in exactly one place, every row and block accounted for.

        Raises:
            AssertionError: A book does not add up; the message says which.

        Cost: linear in blocks, requests and queued requests: for when the engine idles, and for tests.
        """
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, f"{request.request_id} runs, status {request.status}"
            planned = request.num_computed_tokens + request.num_in_flight_tokens
            assert planned <= request.blocks.num_slots, f"{request.request_id} has {planned} tokens planned, no slots"
            assert request.num_computed_tokens <= len(request.token_ids), f"{request.request_id} computed the unknown"
        for request in self.waiting.values():
            assert request.status is RequestStatus.WAITING, f"{request.request_id} waits, status {request.status}"
            assert request.row == -1 and not request.blocks.num_slots, f"{request.request_id} waits with row or blocks"
        places = [request.request_id for request in self.running] + list(self.waiting)
        assert sorted(places) == sorted(self.requests), "a request is in two places or in none"
        queued = sum(len(request.token_ids) for request in self.waiting.values())
        assert queued == self.num_waiting_tokens, f"{queued} tokens wait, {self.num_waiting_tokens} counted"
        assert (self.policy.peek() is None) == (not self.waiting), "the policy's queue and the books disagree"
        rows = sorted([request.row for request in self.running] + self._free_rows)
        assert rows == list(range(self._max_num_rows)), f"rows are lost or doubled: {rows}"
        if not self.in_flight:
            late = [request.request_id for request in self.requests.values() if request.num_in_flight_tokens]
            assert not late, f"nothing is in flight, but {late} wait for results"
        self.kv_cache.check(request.blocks for request in self.running)


def _timeline(request: Request) -> RequestTimeline:
    """Shares ``timings`` with the request: to be read before the next step, or when it has finished."""
    return RequestTimeline(
        request_id=request.request_id,
        status=request.status.name.lower(),
        tenant=request.tenant,
        arrival_time_s=request.arrival_time_s,
        timings=request.timings,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_output_tokens=request.num_output_tokens,
        finish_reason=None if request.finish_reason is None else request.finish_reason.value,
    )

"""Random workloads, and two loops that drive the real scheduler over the fake worker through them.

``run_workload`` makes everything from one seed: KV groups, block size, pool, budgets, policy, depth, requests with
shared prefixes, salts, stops, aborts and errors. It checks each request against ``reference_outputs`` and the books
after every turn. ``EngineLoop`` is the loop of the product; ``AdversarialLoop`` plans and applies in random order as
far as the depth allows, which the product's loop never does, but a slow or quick device may.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from octavo.config.sections import CacheConfig, SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.executor.inline import InlineExecutor
from octavo.kv_spec import KVCacheSpec
from octavo.messages import (
    AbortRequests,
    CoreOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineSnapshot,
    FinishReason,
    ModelRunnerOutput,
    ResolvedSampling,
    SchedulerOutput,
)
from octavo.sampling_params import RepetitionDetection
from octavo.scheduler.scheduler import Scheduler
from tests.simulation.configs import cache_config, kv_spec, scheduler_config
from tests.simulation.fake_worker import FakeWorker, ReferenceOutput, never, reference_outputs

VOCAB_SIZE = 30


class Loop(Protocol):
    """What drives a scheduler over a worker."""

    outputs: list[EngineCoreOutput]
    """Everything delivered so far, in order."""

    def add(self, request: EngineCoreRequest) -> None: ...
    def abort(self, request_ids: list[str]) -> None: ...
    def turn(self) -> None: ...
    def is_idle(self) -> bool: ...


class EngineLoop:
    """The engine's own loop."""

    def __init__(self, scheduler: Scheduler, worker: FakeWorker, depth: int, rng: random.Random) -> None:  # noqa: ARG002
        self.outputs: list[EngineCoreOutput] = []
        self._core = EngineCore(scheduler, InlineExecutor(worker), depth, self._take)

    def add(self, request: EngineCoreRequest) -> None:
        self._core.put(request)

    def abort(self, request_ids: list[str]) -> None:
        self._core.put(AbortRequests(request_ids))

    def turn(self) -> None:
        self._core.run_once(0)

    def is_idle(self) -> bool:
        return self._core.is_idle()

    def _take(self, client_index: int, message: CoreOutput) -> None:  # noqa: ARG002
        assert isinstance(message, EngineCoreOutputs), message
        self.outputs += message.outputs


class AdversarialLoop:
    """Plans or applies at random, whichever the depth allows."""

    def __init__(self, scheduler: Scheduler, worker: FakeWorker, depth: int, rng: random.Random) -> None:
        self.outputs: list[EngineCoreOutput] = []
        self._scheduler = scheduler
        self._worker = worker
        self._depth = depth
        self._rng = rng
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(self, request: EngineCoreRequest) -> None:
        self._scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        self.outputs += self._scheduler.abort(request_ids)

    def turn(self) -> None:
        has_room = len(self._in_flight) < self._depth
        if has_room and (not self._in_flight or self._rng.random() < 0.6):
            plan = self._scheduler.schedule()
            if plan is not None:
                self._in_flight.append((plan, self._worker.forward(plan, self._scheduler.grammar_mask(plan)).result()))
                return
            stuck = not self._in_flight and self._scheduler.has_admissible_work()
            assert not stuck, f"nothing in flight and nothing planned: {self._scheduler.snapshot()}"
        if self._in_flight:
            self.outputs += self._scheduler.update(*self._in_flight.popleft())

    def is_idle(self) -> bool:
        return not self._in_flight and not self._scheduler.has_admissible_work()


LoopClass = Callable[[Scheduler, FakeWorker, int, random.Random], Loop]


@dataclass(slots=True)
class Workload:
    """One random engine and what is asked of it."""

    scheduler_config: SchedulerConfig
    cache_config: CacheConfig
    kv_spec: KVCacheSpec
    num_blocks: int
    depth: int
    error_when: Callable[[int], bool]
    arrivals: list[tuple[int, EngineCoreRequest]]
    """Turn and request."""
    aborts: dict[int, list[str]]
    """Turn to request ids."""


@dataclass(slots=True)
class Received:
    """What one frontend saw of one request."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    prompt_logprobs: list[float] = field(default_factory=list[float])
    last: EngineCoreOutput | None = None


def make_workload(rng: random.Random) -> Workload:
    """Draw everything; a third are storms: many short prompts with long answers in a cache for one."""
    is_storm = rng.random() < 0.35
    block_size = rng.choice([1, 2, 3, 4] if is_storm else [1, 2, 3, 4, 8, 16])
    windows = rng.choice([(None,), (None,), (None, rng.randint(1, 24)), (rng.randint(1, 24),), (None, 3, 9)])
    spec = kv_spec(block_size, *windows)
    max_model_len = rng.randint(30, 60) if is_storm else rng.randint(8, 80)
    is_chunking = rng.random() < 0.8
    max_num_batched_tokens = rng.choice([1, 3, 8, 24, 64]) if is_chunking else max_model_len + rng.randint(0, 20)
    policy = rng.choice(["fcfs", "priority", "fair"])
    config = scheduler_config(
        max_model_len=max_model_len,
        max_num_seqs=16 if is_storm else rng.choice([1, 3, 8]),
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=is_chunking,
        long_prefill_token_threshold=rng.choice([0, 0, 2, 7]) if is_chunking else 0,
        policy=policy,
        tenant_weights={"a": rng.choice([0.5, 1.0, 3.0])},
    )
    requests = _make_requests(rng, max_model_len, policy, is_storm)
    # As small as the longest request allows, so that most workloads preempt.
    needed = max(_num_blocks_for(request, spec, max_model_len, is_chunking) for request in requests)
    aborts: dict[int, list[str]] = {}
    for request in requests:
        if rng.random() < 0.15:
            aborts.setdefault(rng.randint(0, 60), []).append(request.request_id)
    modulus = rng.choice([0, 0, 0, 0, 211])
    return Workload(
        scheduler_config=config,
        cache_config=cache_config(
            block_size,
            enable_prefix_caching=rng.random() < 0.8,
            prefix_caching_hash_algo=rng.choice(["sha256", "blake2b"]),
        ),
        kv_spec=spec,
        num_blocks=1 + needed + (rng.randint(0, 2) if is_storm else rng.choice([0, 1, 3, needed, 4 * needed])),
        depth=rng.randint(1, 3),
        error_when=(lambda history: history % modulus == 5) if modulus else never,
        arrivals=[(rng.randint(0, 3 if is_storm else 30), request) for request in requests],
        aborts=aborts,
    )


def _num_blocks_for(request: EngineCoreRequest, spec: KVCacheSpec, max_model_len: int, is_chunking: bool) -> int:
    num_tokens = min(len(request.prompt_token_ids) + request.sampling.max_tokens, max_model_len) - 1
    total = 0
    for group in spec.groups:
        blocks = -(-num_tokens // spec.block_size)
        if is_chunking and group.sliding_window is not None:
            blocks = min(blocks, -(-(group.sliding_window - 1) // spec.block_size) + 1)
        total += blocks
    return total


def _make_requests(rng: random.Random, max_model_len: int, policy: str, is_storm: bool) -> list[EngineCoreRequest]:
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(max_model_len)] for _ in range(2)]
    requests: list[EngineCoreRequest] = []
    for index in range(rng.randint(6, 12) if is_storm else rng.randint(2, 10)):
        length = rng.randint(1, max(1, max_model_len // 4) if is_storm else max_model_len - 1)
        shared = rng.choice([rng.randint(0, length), max(0, length - rng.randint(0, 2))])
        prompt = rng.choice(stems)[:shared] + [rng.randrange(VOCAB_SIZE) for _ in range(length - shared)]
        salt = rng.choice([None, None, "a", "b"])
        max_tokens = rng.randint(20, 60) if is_storm else rng.randint(1, 20)
        requests.append(
            EngineCoreRequest(
                request_id=f"r{index}",
                prompt_token_ids=prompt,
                sampling=ResolvedSampling(
                    max_tokens=max_tokens,
                    seed=0 if salt is None else ord(salt),
                    min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
                    eos_token_ids=rng.choice([[], [], [rng.randrange(VOCAB_SIZE)]]),
                    stop_token_ids=rng.choice([[], [], [rng.randrange(VOCAB_SIZE), 99]]),
                    logprobs=rng.choice([None, None, 0]),
                    prompt_logprobs=rng.choice([None, None, None, 0]),
                    repetition_detection=rng.choice([None, None, None, RepetitionDetection(max_pattern_size=2)]),
                    skip_reading_prefix_cache=rng.random() < 0.1,
                ),
                arrival_time_s=0.0,
                tenant=rng.choice(["a", "b", "c"]),
                priority=rng.choice([0, 0, 1, -1]) if policy == "priority" else 0,
                cache_salt=salt,
            )
        )
    return requests


def run_workload(seed: int, loop_class: LoopClass) -> EngineSnapshot:
    """Draw a workload, run it to the end, check everything; the last snapshot.

    Raises:
        AssertionError: Anything is not as it must be; the message begins with the seed.
    """
    rng = random.Random(seed)
    workload = make_workload(rng)
    scheduler = Scheduler(workload.scheduler_config, workload.cache_config, workload.kv_spec, workload.num_blocks)
    worker = FakeWorker(
        workload.kv_spec,
        vocab_size=VOCAB_SIZE,
        error_when=workload.error_when,
        max_num_rows=workload.scheduler_config.max_num_seqs,
        max_num_tokens=workload.scheduler_config.max_num_batched_tokens,
        history_by_seed=True,
    )
    worker.allocate(workload.num_blocks)
    loop = loop_class(scheduler, worker, workload.depth, rng)
    try:
        drive(workload, scheduler, loop, books_interval=rng.choice([1, 7, 7, 7]))
        return check_outcome(workload, scheduler, loop.outputs)
    except AssertionError as error:
        raise AssertionError(f"workload {seed} with {loop_class}: {error}") from error


def drive(workload: Workload, scheduler: Scheduler, loop: Loop, books_interval: int) -> None:
    """Turn the loop until all is done, adding and aborting on the way; the books are checked as it goes."""
    pending = sorted(workload.arrivals, key=lambda arrival: arrival[0])
    total_tokens = sum(len(r.prompt_token_ids) + r.sampling.max_tokens for _, r in pending)
    # No request starves: even one token per step, with every preemption computing all again, ends well before this.
    max_turns = 200 + 20 * total_tokens * workload.depth
    for turn in range(max_turns):
        while pending and pending[0][0] <= turn:
            loop.add(pending.pop(0)[1])
        if turn in workload.aborts:
            loop.abort(workload.aborts[turn])
        loop.turn()
        if turn % books_interval == 0:
            scheduler.check_books()
        if not pending and loop.is_idle():
            return
    raise AssertionError(f"not done after {max_turns} turns: {scheduler.snapshot()}")


def collect(outputs: list[EngineCoreOutput]) -> dict[str, Received]:
    """Put the outputs of each request together; none may come after its last."""
    received: dict[str, Received] = {}
    for output in outputs:
        got = received.setdefault(output.request_id, Received())
        assert got.last is None, f"{output.request_id} got an output after its last"
        got.token_ids += output.new_token_ids
        if output.logprobs is not None:
            assert len(output.logprobs.token_ids) == len(output.new_token_ids)
            got.logprobs += [values[0] for values in output.logprobs.logprobs]
        if output.prompt_logprobs is not None:
            got.prompt_logprobs += [values[0] for values in output.prompt_logprobs.logprobs]
        if output.finish_reason is not None:
            got.last = output
    return received


def check_outcome(workload: Workload, scheduler: Scheduler, outputs: list[EngineCoreOutput]) -> EngineSnapshot:
    """Compare every request with its reference, and the counters with what was delivered."""
    received = collect(outputs)
    aborted = {request_id for ids in workload.aborts.values() for request_id in ids}
    for _, request in workload.arrivals:
        got = received.get(request.request_id)
        assert got is not None and got.last is not None, f"{request.request_id} never ended"
        _check_request(workload, request, got, request.request_id in aborted)
    snapshot = scheduler.snapshot()
    scheduler.check_books()
    assert snapshot.num_running == snapshot.num_waiting == 0
    assert snapshot.num_free_blocks == workload.num_blocks - 1, "a block is leaked"
    assert snapshot.generation_tokens == sum(len(got.token_ids) for got in received.values())
    assert sum(snapshot.finished.values()) == len(workload.arrivals)
    begun = [request for _, request in workload.arrivals if received[request.request_id].token_ids]
    assert snapshot.prompt_tokens == sum(len(request.prompt_token_ids) for request in begun)
    assert sum(snapshot.tenant_tokens.values()) == snapshot.prompt_tokens + snapshot.generation_tokens
    assert snapshot.prefix_hits <= snapshot.prefix_queries
    assert scheduler.reset_prefix_cache()
    assert scheduler.snapshot().num_cached_blocks == 0
    return snapshot


def _check_request(workload: Workload, request: EngineCoreRequest, got: Received, was_aborted: bool) -> None:
    name = request.request_id
    wanted: ReferenceOutput = reference_outputs(
        request.prompt_token_ids,
        request.sampling,
        vocab_size=VOCAB_SIZE,
        max_model_len=workload.scheduler_config.max_model_len,
        error_when=workload.error_when,
        history_by_seed=True,
    )
    assert got.last is not None and got.last.timings is not None, f"{name}: no timings"
    assert got.last.num_cached_tokens < len(request.prompt_token_ids)
    if was_aborted and got.last.finish_reason is FinishReason.ABORT:
        assert got.token_ids == wanted.token_ids[: len(got.token_ids)], f"{name}: wrong tokens before the abort"
        return
    assert got.token_ids == wanted.token_ids, f"{name}: {got.token_ids} instead of {wanted.token_ids}"
    assert got.last.finish_reason is wanted.finish_reason, f"{name}: {got.last.finish_reason}"
    assert got.last.stop_reason == wanted.stop_reason, f"{name}: stop reason {got.last.stop_reason}"
    assert (got.last.error is not None) == (wanted.finish_reason is FinishReason.ERROR)
    if request.sampling.logprobs is not None:
        assert got.logprobs == wanted.logprobs, f"{name}: wrong logprobs"
    if request.sampling.prompt_logprobs is not None and wanted.token_ids:
        assert got.prompt_logprobs == wanted.prompt_logprobs, f"{name}: wrong prompt logprobs"

"""Scheduler: which requests run in the next step, and with how many tokens.

One quantity decides everything: tokens per request per step. Running requests come first, by rank, then waiting ones
while tokens, rows and blocks last; a prompt is cut into chunks where the budget ends. When blocks run out, requests of
higher rank are preempted: removed, and computed again later. Three rules keep this safe with several steps in flight:

* A waiting request with tokens in flight is not admitted: its next known token is still to come.
* Only requests that come after in the order of ranks are preempted, so none that is in the plan already.
* The first of the running is never preempted and can preempt all others, so something always finishes.

Token values are never needed to plan: a token sampled in flight stays on the device. Results are applied by
``update.py``; who is where is written in ``books.py``; blocks are ``kv_cache``'s.
Papers: Yu et al., "Orca", OSDI 2022 (iteration-level scheduling); Kwon et al., SOSP 2023 (preemption by recomputation);
Agrawal et al., OSDI 2024 (chunked prefill).
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from octavo.config.sections import CacheConfig, SchedulerConfig
from octavo.errors import ConfigError, ContextLengthError, InvalidRequestError, QueueFullError
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_spec import KVCacheSpec
from octavo.messages import (
    EngineCoreOutput,
    EngineCoreRequest,
    EngineSnapshot,
    FinishReason,
    ModelRunnerOutput,
    NewRow,
    RequestTimeline,
    RequestTimings,
    SchedulerOutput,
)
from octavo.scheduler.books import Books, StepRecord
from octavo.scheduler.budget import StepBudget
from octavo.scheduler.policy import make_policy
from octavo.scheduler.request import Request
from octavo.scheduler.update import apply_result, last_output


@dataclass(slots=True)
class _Draft:
    """The plan being made, column by column."""

    record: StepRecord
    rows: list[int] = field(default_factory=list[int])
    num_scheduled_tokens: list[int] = field(default_factory=list[int])
    new_rows: list[NewRow] = field(default_factory=list[NewRow])
    block_rows: list[int] = field(default_factory=list[int])
    block_groups: list[int] = field(default_factory=list[int])
    block_ids: list[int] = field(default_factory=list[int])
    has_preempted: bool = False

    def run(self, request: Request, start: int, count: int) -> None:
        """The request runs ``count`` tokens from position ``start`` on."""
        request.num_in_flight_tokens += count
        self.rows.append(request.row)
        self.num_scheduled_tokens.append(count)
        self.record.requests.append(request)
        self.record.starts.append(start)
        self.record.preemptions.append(request.num_preemptions)


_RETRY_STEPS = 16
"""A request that found no room is looked at again after so many steps, even if no block has been freed since: others
may have filled the cache with its prefix."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why it would be in vain to try to admit the first of the queue again: matching costs time in its length."""

    request: Request
    num_free_blocks: int
    num_running: int
    step_id: int


class Scheduler:
    """Plans steps for one engine core. Called from one thread."""

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        kv_spec: KVCacheSpec,
        num_blocks: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            scheduler_config: Limits of a step and of the queue, and the policy.
            cache_config: Prefix caching.
            kv_spec: KV groups and block size.
            num_blocks: Blocks in the cache, the null block included.
            clock: Seconds, for timings.

        Raises:
            ConfigError: Settings exclude each other, or the policy or hash is unknown.
        """
        if scheduler_config.num_speculative_tokens:
            raise ConfigError(
                f"num_speculative_tokens is {scheduler_config.num_speculative_tokens}, but this version of Octavo has "
                "no speculative decoding yet: leave it at 0",
                param="num_speculative_tokens",
            )
        self._config = scheduler_config
        self._budget = StepBudget(scheduler_config)
        self._kv_cache = KVCacheManager(cache_config, kv_spec, num_blocks)
        self._books = Books(self._kv_cache, make_policy(scheduler_config), scheduler_config.max_num_seqs)
        self._clock = clock
        self._num_plans = 0
        self._refusal: _Refusal | None = None
        self._arrivals = itertools.count()

    # ------------------------------------------------------------------------------------------------- in and out

    def add(self, request: EngineCoreRequest) -> None:
        """Take a request into the queue.

        Raises:
            InvalidRequestError: The id is in use, or a field has a value that this engine cannot honour.
            ContextLengthError: It can never fit the context or the KV cache.
            QueueFullError: The queue has reached one of its limits.
        """
        max_total_tokens = self._check(request)
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        token_ids = list(request.prompt_token_ids)
        resumption = request.resumption
        if resumption is None:
            self._check_queue(num_prompt_tokens)
        else:
            token_ids += resumption.output_token_ids
            has_ended = request.pooling is None and len(token_ids) >= max_total_tokens
            assert not has_ended, f"{request.request_id} has ended, nothing is left to resume"
        self._books.enqueue(
            Request(
                request_id=request.request_id,
                sampling=sampling,
                token_ids=token_ids,
                num_prompt_tokens=num_prompt_tokens,
                max_total_tokens=max_total_tokens,
                min_total_tokens=num_prompt_tokens + sampling.min_tokens,
                stop_ids=frozenset(sampling.eos_token_ids) | frozenset(sampling.stop_token_ids),
                is_repetition_watched=sampling.repetition_detection is not None,
                tenant=request.tenant,
                priority=request.priority,
                arrival_index=next(self._arrivals),
                blocks=self._kv_cache.open(token_ids, request.lora_name, request.cache_salt),
                timings=RequestTimings(queued_s=self._clock()),
                arrival_time_s=request.arrival_time_s,
                num_prompt_logprobs=0 if resumption is None else resumption.num_prompt_logprobs,
                pooling=request.pooling,
            )
        )

    def abort(self, request_ids: Sequence[str], *, only_if_waiting: bool = False) -> list[EngineCoreOutput]:
        """End requests wherever they are; unknown ids are passed over. Each known one gets its last output.

        Args:
            request_ids: Whom to end.
            only_if_waiting: End none of them if any has run already, be it for one step.
        """
        if only_if_waiting:
            known = [self._books.requests[each] for each in request_ids if each in self._books.requests]
            if any(request.timings.scheduled_s for request in known):
                return []
        outputs: list[EngineCoreOutput] = []
        for request_id in request_ids:
            request = self._books.requests.get(request_id)
            if request is not None:
                self._books.finish(request, FinishReason.ABORT, self._clock())
                outputs.append(last_output(request, []))
        return outputs

    def update(self, plan: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Apply the result of a plan; results come in the order of the plans."""
        return apply_result(self._books, plan, result, self._clock())

    # ------------------------------------------------------------------------------------------------------ questions

    def has_admissible_work(self) -> bool:
        """Whether any request is left that ``schedule`` would plan, now or once what is in flight has come back."""
        return bool(self._books.requests)

    def grammar_mask(self, plan: SchedulerOutput) -> bytes | None:  # noqa: ARG002
        """The mask of allowed tokens for a plan: no request can ask for a grammar yet, so there is none."""
        return None

    def snapshot(self) -> EngineSnapshot:
        """The numbers of this moment."""
        return self._books.snapshot(self._clock())

    def timeline(self, request_id: str) -> list[RequestTimeline]:
        """What became of a request, one entry per sequence of it; empty if it is not known (any more)."""
        return self._books.timeline(request_id)

    def find(self, request_ids: Collection[str], tenant: str | None) -> dict[str, list[str]]:
        """Which of these requests are in the books, each with the ids of its sequences; see ``Books.find``."""
        return self._books.find(request_ids, tenant)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing happens, while requests run."""
        return self._kv_cache.reset()

    def check_books(self) -> None:
        """Walk all books; for when the engine idles, and for tests.

        Raises:
            AssertionError: Something is lost, doubled or miscounted.
        """
        self._books.check()

    # ------------------------------------------------------------------------------------------------------- planning

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step; None when nothing can run before a result comes back, or nothing is left."""
        draft = _Draft(StepRecord([], [], []))
        self._budget.begin()
        self._plan_running(draft)
        if not draft.has_preempted:  # blocks are short: let those who run go on
            self._plan_waiting(draft)
        if not draft.rows:
            return None
        books = self._books
        plan = SchedulerOutput(
            step_id=self._num_plans,
            removed_rows=books.removed_rows,
            new_rows=draft.new_rows,
            rows=draft.rows,
            num_scheduled_tokens=draft.num_scheduled_tokens,
            block_rows=draft.block_rows,
            block_groups=draft.block_groups,
            block_ids=draft.block_ids,
        )
        self._num_plans += 1
        books.removed_rows = []
        books.in_flight[plan.step_id] = draft.record
        books.count_step(sum(draft.num_scheduled_tokens))
        return plan

    def _plan_running(self, draft: _Draft) -> None:
        running = self._books.running
        budget = self._budget
        index = 0
        while index < len(running) and budget.num_tokens_left > 0:
            request = running[index]
            index += 1
            start = request.num_computed_tokens + request.num_in_flight_tokens
            num_remaining = len(request.token_ids) - start
            if num_remaining == 1:
                count = 1
            elif num_remaining > 1:
                count = budget.chunk(num_remaining, len(running) - index)
            elif start + 1 < request.max_total_tokens:
                count = 1  # the token to run is on the device only
            else:
                continue  # its last token is in flight
            if start + count > request.blocks.num_slots:
                count = self._make_room(draft, request, index, start, count)
                if count == 0:
                    continue
            budget.num_tokens_left -= count
            draft.run(request, start, count)

    def _make_room(self, draft: _Draft, request: Request, index: int, start: int, count: int) -> int:
        """Give a running request slots for the tokens from ``start`` on, preempting those behind it if need be.

        Args:
            draft: Gets the new blocks.
            request: Who needs room.
            index: Where those behind it begin.
            start: Position of its next token.
            count: Tokens that it would run.

        Returns:
            How many it can run: fewer than ``count`` if only part of a chunk has room, 0 if there is none.
        """
        kv_cache = self._kv_cache
        while kv_cache.reach(request.blocks) <= start:
            candidates = self._books.running[index:]
            if not candidates:
                # It keeps what it has and waits for those before it, or for its own blocks that leave the window.
                return 0
            self._books.preempt(self._books.policy.victim(candidates), self._clock())
            draft.has_preempted = True
        count = min(count, kv_cache.reach(request.blocks) - start)
        added = kv_cache.grow(request.blocks, start + count)
        assert added is not None
        for group_index, blocks in enumerate(added):
            for block in blocks:
                draft.block_rows.append(request.row)
                draft.block_groups.append(group_index)
                draft.block_ids.append(block.block_id)
        return count

    def _plan_waiting(self, draft: _Draft) -> None:
        books = self._books
        while self._budget.num_tokens_left > 0 and books.has_free_row:
            request = books.policy.peek()
            if request is None or request.num_in_flight_tokens or self._is_in_vain(request):
                return
            if not self._admit(draft, request):
                return

    def _is_in_vain(self, request: Request) -> bool:
        """Whether it found no room a moment ago and nothing has changed for the better."""
        refusal = self._refusal
        return (
            refusal is not None
            and refusal.request is request
            and self._kv_cache.num_free_blocks <= refusal.num_free_blocks
            and len(self._books.running) >= refusal.num_running
            and self._num_plans < refusal.step_id + _RETRY_STEPS
        )

    def _admit(self, draft: _Draft, request: Request) -> bool:
        """Let a waiting request run if tokens and blocks allow; whether it does."""
        kv_cache = self._kv_cache
        if kv_cache.num_free_blocks < kv_cache.num_groups:
            return False
        hit = kv_cache.match(request.blocks) if request.may_read_prefix_cache else kv_cache.no_hit()
        start = hit.num_tokens
        num_known = len(request.token_ids)
        # All that it knows must have room, not only the first chunk. One that has been preempted leaves a block to
        # each running request, or it would be the victim again as soon as they grow.
        num_free_wanted = kv_cache.num_free_needed(hit, num_known)
        if request.num_preemptions:
            num_free_wanted += len(self._books.running)
        if kv_cache.num_free_blocks < num_free_wanted:
            self._refusal = _Refusal(request, kv_cache.num_free_blocks, len(self._books.running), self._num_plans)
            return False
        count = min(self._budget.chunk(num_known - start, 0), kv_cache.reach(hit) - start)
        if count <= 0 or (count < num_known - start and not self._budget.is_chunking):
            return False
        has_started = kv_cache.start(request.blocks, hit, start + count)
        assert has_started
        self._refusal = None
        self._books.admit(request, hit, self._clock())
        draft.new_rows.append(
            NewRow(
                row=request.row,
                token_ids=request.token_ids.copy(),
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=start,
                sampling=request.sampling,
                block_ids=request.blocks.block_ids(),
                pooling=request.pooling,
            )
        )
        self._budget.num_tokens_left -= count
        draft.run(request, start, count)
        return True

    # --------------------------------------------------------------------------------------------------------- checks

    def _check(self, request: EngineCoreRequest) -> int:
        """Refuse what can never run; the most tokens that the request comes to."""
        num_prompt = len(request.prompt_token_ids)
        max_model_len = self._config.max_model_len
        if request.request_id in self._books.requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if num_prompt == 0:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if request.sampling.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens is {request.sampling.max_tokens}, but must be at least 1", param="max_tokens"
            )
        if request.lora_name is not None:
            raise InvalidRequestError(
                f"LoRA adapter {request.lora_name!r}: adapters are not supported by this version of Octavo yet",
                param="lora_name",
            )
        if request.priority and self._config.policy in ("fcfs", "fair"):
            raise InvalidRequestError(
                f"priority is {request.priority}, but the engine runs with the {self._config.policy} policy: leave "
                "it out, or start with --scheduling-policy priority",
                param="priority",
            )
        pools = request.pooling is not None
        if num_prompt >= max_model_len + pools:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens, but the context of {max_model_len} tokens (max_model_len) must "
                + ("hold it" if pools else "also hold at least one token of the answer"),
                param="prompt",
            )
        try:
            array("I", request.prompt_token_ids)
        except (OverflowError, TypeError) as error:
            raise InvalidRequestError(
                f"the prompt holds something that is no token id: {error}", param="prompt"
            ) from error
        # One that pools ends where others draw their first token.
        max_total_tokens = num_prompt + 1 if pools else min(num_prompt + request.sampling.max_tokens, max_model_len)
        self._check_blocks(request, max_total_tokens)
        return max_total_tokens

    def _check_blocks(self, request: EngineCoreRequest, max_total_tokens: int) -> None:
        # The last token is sampled but never run.
        needed = self._kv_cache.num_blocks_for(max_total_tokens - 1, at_once=not self._budget.is_chunking)
        if needed > self._kv_cache.num_blocks - 1:
            num_prompt = len(request.prompt_token_ids)
            raise ContextLengthError(
                f"{num_prompt} prompt tokens and up to {max_total_tokens - num_prompt} new ones need {needed} KV cache "
                f"blocks of {self._kv_cache.block_size} tokens, but the cache has {self._kv_cache.num_blocks - 1}: "
                "shorten the prompt, lower max_tokens, or give the KV cache more memory",
                param="max_tokens",
            )

    def _check_queue(self, num_tokens: int) -> None:
        num_waiting = len(self._books.waiting)
        if num_waiting >= self._config.max_num_queued_reqs:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, the most that max_num_queued_reqs allows; try again later"
            )
        # An empty queue takes any prompt: it fits the context, and "try again later" would never help.
        if num_waiting and self._books.num_waiting_tokens + num_tokens > self._config.max_num_queued_tokens:
            raise QueueFullError(
                f"{self._books.num_waiting_tokens} tokens are waiting and {num_tokens} more would exceed "
                f"max_num_queued_tokens ({self._config.max_num_queued_tokens}); try again later"
            )

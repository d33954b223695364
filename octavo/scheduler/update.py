"""Apply the result of a step: count, append, commit, stop, free, and say what is new.

A result belongs to the plan that was made for it, whatever has happened to its requests since: of a finished request
nothing is wanted any more, of a preempted one the token still counts but the keys and values are gone. Knows no text:
stop strings are the frontend's, which sends an abort when one fires.
"""

from __future__ import annotations

from octavo.messages import (
    EngineCoreOutput,
    FinishReason,
    Logprobs,
    ModelRunnerOutput,
    Pooled,
    SchedulerOutput,
)
from octavo.sampling_params import RepetitionDetection
from octavo.scheduler.books import Books
from octavo.scheduler.request import Request, RequestStatus


def apply_result(
    books: Books, plan: SchedulerOutput, result: ModelRunnerOutput, now_s: float
) -> list[EngineCoreOutput]:
    """Bring the books up to date with one step.

    Args:
        books: Changed in place.
        plan: As ``schedule`` returned it; the oldest that has not come back.
        result: What the worker made of it.
        now_s: ``RequestTimings`` clock.

    Returns:
        One output per request that has something new: a token, prompt logprobs, its end.
    """
    assert result.step_id == plan.step_id == next(iter(books.in_flight)), "results come in the order of the plans"
    record = books.in_flight.pop(plan.step_id)
    books.counters.forward_ms += result.forward_ms
    outputs: list[EngineCoreOutput] = []
    served: dict[str, int] = {}
    for index, request in enumerate(record.requests):
        start = record.starts[index]
        end = start + plan.num_scheduled_tokens[index]
        request.num_in_flight_tokens -= end - start
        if request.status is RequestStatus.FINISHED:
            continue
        if result.errors and index in result.errors:
            books.finish(request, FinishReason.ERROR, now_s)
            outputs.append(last_output(request, [], error=result.errors[index]))
            continue
        if request.num_preemptions == record.preemptions[index]:
            _count_computed(books, request, end)
        if result.pooled and (pooled := result.pooled[index]) is not None:
            outputs.append(_finish_pooled(books, request, pooled, now_s))
            continue
        prompt_logprobs = None
        if result.prompt_logprobs:
            prompt_logprobs = _undelivered(request, start, result.prompt_logprobs[index])
        new_token_ids = result.token_ids[index]
        if new_token_ids:
            assert len(new_token_ids) == 1 and end == len(request.token_ids), f"{request.request_id}: sampled too early"
            output = _append(books, request, new_token_ids, now_s)
            if result.logprobs:
                output.logprobs = result.logprobs[index]
            served[request.tenant] = served.get(request.tenant, 0) + 1
        else:
            assert end < len(request.token_ids), f"{request.request_id}: no token sampled at position {end}"
            if prompt_logprobs is None:
                continue
            output = EngineCoreOutput(request.request_id, [], num_cached_tokens=request.num_cached_tokens)
        output.prompt_logprobs = prompt_logprobs
        outputs.append(output)
    _count_served(books, served)
    return outputs


def _count_computed(books: Books, request: Request, end: int) -> None:
    request.num_computed_tokens = end
    if end >= request.blocks.next_commit_tokens:
        books.kv_cache.commit(request.blocks, end)


def _finish_pooled(books: Books, request: Request, pooled: Pooled, now_s: float) -> EngineCoreOutput:
    """The only output of a request that ends with its prompt."""
    timings = request.timings
    timings.first_token_s = timings.last_token_s = now_s
    _count_prompt(books, request)
    books.finish(request, FinishReason.STOP, now_s)
    output = last_output(request, [])
    output.pooled = pooled
    return output


def last_output(
    request: Request, new_token_ids: list[int], *, stop_reason: int | None = None, error: str | None = None
) -> EngineCoreOutput:
    """The output that ends a finished request, with its timings."""
    return EngineCoreOutput(
        request.request_id,
        new_token_ids,
        finish_reason=request.finish_reason,
        stop_reason=stop_reason,
        num_cached_tokens=request.num_cached_tokens,
        timings=request.timings,
        error=error,
    )


def _append(books: Books, request: Request, new_token_ids: list[int], now_s: float) -> EngineCoreOutput:
    """Confirm a sampled token and end the request if it was the last."""
    token_id = new_token_ids[0]
    token_ids = request.token_ids
    token_ids.append(token_id)
    if request.row < 0:
        books.num_waiting_tokens += 1
    timings = request.timings
    timings.last_token_s = now_s
    if timings.first_token_s == 0.0:
        timings.first_token_s = now_s
        _count_prompt(books, request)
    # Hot: most tokens end nothing, and a few comparisons must be enough to know that.
    num_tokens = len(token_ids)
    may_stop = num_tokens >= request.min_total_tokens and (
        token_id in request.stop_ids or request.is_repetition_watched
    )
    if may_stop or num_tokens >= request.max_total_tokens:
        stop = _find_stop(request, token_id)
        if stop is not None:
            books.finish(request, stop[0], now_s)
            return last_output(request, new_token_ids, stop_reason=stop[1])
    output = EngineCoreOutput(request.request_id, new_token_ids)
    output.num_cached_tokens = request.num_cached_tokens
    return output


def _count_prompt(books: Books, request: Request) -> None:
    counters = books.counters
    counters.prompt_tokens += request.num_prompt_tokens
    counters.cached_prompt_tokens += request.num_cached_tokens
    tokens = counters.tenant_tokens
    tokens[request.tenant] = tokens.get(request.tenant, 0) + request.num_prompt_tokens


def _count_served(books: Books, served: dict[str, int]) -> None:
    counters = books.counters
    for tenant, num_tokens in served.items():
        counters.generation_tokens += num_tokens
        counters.tenant_tokens[tenant] = counters.tenant_tokens.get(tenant, 0) + num_tokens
        books.policy.on_tokens(tenant, 0, num_tokens)


def _find_stop(request: Request, token_id: int) -> tuple[FinishReason, int | None] | None:
    """Why the request ends with the token just appended, and the stop id if it was one; None if it goes on."""
    sampling = request.sampling
    num_tokens = len(request.token_ids)
    if num_tokens >= request.min_total_tokens:
        if token_id in request.stop_ids:
            # An id that is both ends the request as end-of-sequence.
            return FinishReason.STOP, None if token_id in sampling.eos_token_ids else token_id
        rule = sampling.repetition_detection
        if rule is not None and ends_in_repetition(request.token_ids, request.num_prompt_tokens, rule):
            return FinishReason.REPETITION, None
    if num_tokens >= request.max_total_tokens:
        return FinishReason.LENGTH, None
    return None


def ends_in_repetition(token_ids: list[int], start: int, rule: RepetitionDetection) -> bool:
    """Whether ``token_ids[start:]`` ends in ``min_count`` copies of one pattern.

    Cost: a comparison per allowed pattern size where the last token differs from the one a pattern before it, and up
    to ``min_count * max_pattern_size`` where it does not.
    """
    end = len(token_ids)
    for size in range(rule.min_pattern_size, min(rule.max_pattern_size, (end - start) // rule.min_count) + 1):
        # Copies of a pattern of this size = every token equals the one ``size`` places before it.
        span = size * (rule.min_count - 1)
        if (
            token_ids[-1] == token_ids[-1 - size]
            and token_ids[end - span :] == token_ids[end - span - size : end - size]
        ):
            return True
    return False


def _undelivered(request: Request, start: int, logprobs: Logprobs | None) -> Logprobs | None:
    """The part of a chunk's prompt logprobs that has not been delivered, now delivered; None if there is none.

    Chunks of one request come back in order, but a preempted request is computed again from the start.
    """
    if logprobs is None:
        return None
    skip = request.num_prompt_logprobs - start
    assert skip >= 0, f"{request.request_id}: prompt logprobs with a gap before position {start + 1}"
    if skip >= len(logprobs.token_ids):
        return None
    request.num_prompt_logprobs = start + len(logprobs.token_ids)
    if skip == 0:
        return logprobs
    return Logprobs(logprobs.token_ids[skip:], logprobs.logprobs[skip:], logprobs.ranks[skip:])

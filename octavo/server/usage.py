"""Token counts and times of a finished request, as answers show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.outputs import RequestOutput, RequestStateStats
from octavo.server.generation import num_tokens_of


def usage_of(outputs: Iterable[RequestOutput], reasoning_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's ``usage``.

    Args:
        outputs: The newest output of each prompt.
        reasoning_tokens: None where nothing separates thoughts.
    """
    prompt_tokens = completion_tokens = cached_tokens = 0
    for output in outputs:
        prompt_tokens += len(output.prompt_token_ids or ())
        completion_tokens += num_tokens_of(output)
        cached_tokens += output.num_cached_tokens or 0
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return usage


def without_completion(usage: dict[str, Any]) -> dict[str, Any]:
    """``usage`` of a request that only echoes: the one token that the engine made is nobody's."""
    return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}


def metrics_of(outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
    """Times of a request, milliseconds; of several prompts, those of the one that took longest.

    ``queue_time_ms`` is null where the engine did not tell, ``mean_itl_ms`` and ``tokens_per_second`` (of generating,
    after the first token) where there was one token only.
    """
    found = [each.metrics for each in outputs if each.metrics is not None and each.metrics.first_token_ts]
    if not found:
        return None
    return _describe(max(found, key=lambda stats: stats.last_token_ts - stats.queued_ts))


def _describe(stats: RequestStateStats) -> dict[str, Any]:
    generation_s = stats.last_token_ts - stats.first_token_ts
    num_gaps = stats.num_generation_tokens - 1
    has_gaps = num_gaps > 0 and generation_s > 0
    queue_s = stats.scheduled_ts - stats.queued_ts if stats.scheduled_ts and stats.queued_ts else None
    return {
        "time_to_first_token_ms": _milliseconds(stats.first_token_latency),
        "generation_time_ms": _milliseconds(generation_s),
        "queue_time_ms": None if queue_s is None else _milliseconds(queue_s),
        "mean_itl_ms": _milliseconds(generation_s / num_gaps) if has_gaps else None,
        "tokens_per_second": round(num_gaps / generation_s, 2) if has_gaps else None,
    }


def _milliseconds(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)

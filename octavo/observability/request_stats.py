"""What one frontend process sees of its requests, counted: latencies as users meet them, sizes, and how often what.

The output processor tells it of tokens and of ends (it is that module's ``RequestObserver``); the server adds counters
of its own. ``metrics.py`` gives the numbers their names; ``shared.py`` adds up those of several processes. Keeps no
request and no text. One thread observes; others may read, and see each number at most one observation old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from octavo.observability.histogram import (
    ANSWERS_PER_REQUEST,
    SECONDS_OF_LAG,
    SECONDS_PER_REQUEST,
    SECONDS_PER_TOKEN,
    SECONDS_TO_FIRST_TOKEN,
    TOKENS_PER_REQUEST,
    HistogramState,
)
from octavo.outputs import RequestStateStats
from octavo.sampling_params import SamplingParams

BOUNDS: Mapping[str, Sequence[float]] = {
    "time_to_first_token_seconds": SECONDS_TO_FIRST_TOKEN,
    "inter_token_latency_seconds": SECONDS_PER_TOKEN,
    "request_time_per_output_token_seconds": SECONDS_PER_TOKEN,
    "e2e_request_latency_seconds": SECONDS_PER_REQUEST,
    "request_queue_time_seconds": SECONDS_PER_REQUEST,
    "request_inference_time_seconds": SECONDS_PER_REQUEST,
    "request_prefill_time_seconds": SECONDS_PER_REQUEST,
    "request_decode_time_seconds": SECONDS_PER_REQUEST,
    "request_prompt_tokens": TOKENS_PER_REQUEST,
    "request_generation_tokens": TOKENS_PER_REQUEST,
    "request_max_num_generation_tokens": TOKENS_PER_REQUEST,
    "request_params_n": ANSWERS_PER_REQUEST,
    "request_params_max_tokens": TOKENS_PER_REQUEST,
    "request_prefill_kv_computed_tokens": TOKENS_PER_REQUEST,
    "event_loop_lag_seconds": SECONDS_OF_LAG,
}
"""The distributions that are kept."""
MAX_SERIES = 1000
"""Label sets of all counters together; more are counted under ``other``. Labels come from routes and codes, not from
clients, so this is never reached unless somebody passes on what a client sent."""

CounterKey = tuple[str, tuple[tuple[str, str], ...]]
"""Name and sorted labels."""


class StatsRecord(msgspec.Struct):
    """The state of a ``RequestStats`` as data."""

    counts: dict[str, list[int]]
    totals: dict[str, float]
    counters: list[tuple[str, dict[str, str], int]]
    num_open: int = 0
    """Requests that are open now."""


class FinishedRequest(Protocol):
    """What is read of a ``frontend.ProcessedRequest``."""

    @property
    def prompt_token_ids(self) -> list[int]: ...
    @property
    def params(self) -> SamplingParams: ...


class RequestStats:
    """Histograms by name, and counters by name and labels."""

    def __init__(self) -> None:
        self.histograms = {name: HistogramState(bounds) for name, bounds in BOUNDS.items()}
        self.counters: dict[CounterKey, int] = {}
        self._first_token = self.histograms["time_to_first_token_seconds"].observe
        self._gap = self.histograms["inter_token_latency_seconds"].observe

    # ----------------------------------------------------------------------------------------------- what happened

    def first_token(self, latency_s: float) -> None:
        """The first token of a request is here, so long after the request."""
        self._first_token(latency_s)

    def later_tokens(self, gap_s: float, count: int) -> None:
        """Another token of so many answers, each so long after the one before it."""
        self._gap(gap_s, count)

    def finished(
        self, request: FinishedRequest, stats: RequestStateStats, num_cached_tokens: int, now_s: float
    ) -> None:
        """A request has its whole answer.

        Args:
            request: Prompt and parameters.
            stats: Its times; those that are not known are 0.0 and not counted.
            num_cached_tokens: Of its prompt.
            now_s: ``time.time()``.
        """
        if stats.is_corrupted:
            self.count("corrupted_requests")
        params, num_tokens = request.params, stats.num_generation_tokens
        self._whole(len(request.prompt_token_ids), stats, num_cached_tokens, now_s)
        self._observe("request_generation_tokens", num_tokens)
        self._observe("request_max_num_generation_tokens", num_tokens / params.n)
        self._observe("request_params_n", params.n)
        if params.max_tokens is not None:
            self._observe("request_params_max_tokens", params.max_tokens)
        first, last = stats.first_token_ts, stats.last_token_ts
        if first and last >= first:
            self._observe("request_decode_time_seconds", last - first)
            if num_tokens > params.n:
                per_answer = num_tokens / params.n
                self._observe("request_time_per_output_token_seconds", (last - first) / (per_answer - 1))

    def loop_lag(self, lag_s: float) -> None:
        """A timer of the HTTP process was so late."""
        self._observe("event_loop_lag_seconds", lag_s)

    def pooled(self, num_prompt_tokens: int, stats: RequestStateStats, num_cached_tokens: int, now_s: float) -> None:
        """A request has its vector or its scores: there are no tokens of an answer, and reading the text is all.

        Args:
            num_prompt_tokens: Of its text.
            stats: Its times; ``first_token_ts`` is when the numbers were there. Unknown ones are 0.0 and not counted.
            num_cached_tokens: Of its text.
            now_s: ``time.time()``.
        """
        self._whole(num_prompt_tokens, stats, num_cached_tokens, now_s)

    def _whole(self, num_prompt_tokens: int, stats: RequestStateStats, num_cached_tokens: int, now_s: float) -> None:
        """What every kind of request has."""
        self._observe("e2e_request_latency_seconds", now_s - stats.arrival_time)
        self._observe("request_prompt_tokens", num_prompt_tokens)
        self._observe("request_prefill_kv_computed_tokens", num_prompt_tokens - num_cached_tokens)
        if stats.scheduled_ts:
            if stats.queued_ts:
                self._observe("request_queue_time_seconds", stats.scheduled_ts - stats.queued_ts)
            if stats.first_token_ts:
                self._observe("request_prefill_time_seconds", stats.first_token_ts - stats.scheduled_ts)
                self._observe("request_inference_time_seconds", stats.last_token_ts - stats.scheduled_ts)

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter.

        Args:
            name: Without prefix and without ``_total``; known to ``metrics.py``.
            amount: What to add.
            labels: From a bounded set of values.
        """
        key = (name, tuple(sorted(labels.items())))
        if key not in self.counters and len(self.counters) >= MAX_SERIES:
            key = (name, tuple((label, "other") for label, _ in key[1]))
        self.counters[key] = self.counters.get(key, 0) + amount

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(max(value, 0.0))

    # --------------------------------------------------------------------------------------------------- as data

    def record(self) -> StatsRecord:
        """A copy as data."""
        return StatsRecord(
            counts={name: list(each.counts) for name, each in self.histograms.items()},
            totals={name: each.total for name, each in self.histograms.items()},
            counters=[(name, dict(labels), value) for (name, labels), value in list(self.counters.items())],
        )

    def merge(self, record: StatsRecord) -> None:
        """Add what another process counted. Histograms with other bounds (of another version) are left out."""
        for name, counts in record.counts.items():
            mine = self.histograms.get(name)
            if mine is not None and len(counts) == len(mine.counts):
                mine.merge(counts, record.totals.get(name, 0.0))
        for name, labels, value in record.counters:
            self.count(name, value, **labels)

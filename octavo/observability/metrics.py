"""All numbers as named metrics, under the names that dashboards for vLLM use, with our prefix.

``LLM.get_metrics()`` returns these objects; ``prometheus.py`` renders the same list for a scraper. They come from two
places only: the engine's last ``EngineSnapshot``, and the frontend's ``RequestStats``. Rates are ``stats.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from octavo.config.sections import CacheConfig
from octavo.messages import EngineSnapshot
from octavo.observability.histogram import TOKENS_PER_STEP
from octavo.observability.request_stats import RequestStats
from octavo.observability.stats import kv_cache_usage

PREFIX = "octavo:"
MIRROR_PREFIX = "vllm:"
"""Of the copies for dashboards that know these names with vLLM's prefix."""
OLDER_NAMES: Mapping[str, str] = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""What earlier versions of vLLM called some of them: mirrored as well, for dashboards made for those."""

HELP: Mapping[str, str] = {
    "num_requests_running": "Requests on the device.",
    "num_requests_waiting": "Requests in the queue.",
    "num_requests_waiting_by_reason": "Requests in the queue, by what they wait for.",
    "kv_cache_usage_perc": "Share of the KV cache that requests hold, 0 to 1.",
    "cache_config_info": "Settings of the KV cache, as labels.",
    "prompt_tokens": "Prompt tokens of requests that have their first token, cached ones included.",
    "prompt_tokens_cached": "Those of them that were found in the prefix cache.",
    "prompt_tokens_by_source": "Prompt tokens by where their keys and values came from.",
    "generation_tokens": "Tokens generated.",
    "num_preemptions": "Times that a running request gave up its place to be computed again later.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "request_success": "Finished requests, by reason: stop, length, repetition, abort, error.",
    "corrupted_requests": "Requests that ended with an error of the model, such as NaN logits.",
    "engine_steps": "Steps of the engine.",
    "engine_device_seconds": "Time that the device has worked on steps.",
    "tenant_tokens": "Tokens served by tenant, prompt and answer.",
    "iteration_tokens_total": "Tokens run per step of the engine.",
    "time_to_first_token_seconds": "From the request to its first token, in the frontend.",
    "inter_token_latency_seconds": "Between two outputs of one answer, in the frontend.",
    "request_time_per_output_token_seconds": "Mean time per token after the first, one value per request.",
    "e2e_request_latency_seconds": "From the request to the end of its answer.",
    "request_queue_time_seconds": "In the engine's queue before the first step.",
    "request_inference_time_seconds": "From the first step to the last token.",
    "request_prefill_time_seconds": "From the first step to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Prompt tokens per request.",
    "request_generation_tokens": "Generated tokens per request.",
    "request_max_num_generation_tokens": "Generated tokens per request, the mean over its answers.",
    "request_params_n": "Answers asked for per request.",
    "request_params_max_tokens": "max_tokens of requests that set it.",
    "request_prefill_kv_computed_tokens": "Prompt tokens per request that were not in the prefix cache.",
    "event_loop_lag_seconds": "How late the HTTP process came to what was due, looked at ten times a second.",
    "http_requests": "Answered HTTP requests by route, method and status.",
    "engine_restarts": "Times that the engine's process was started again after it had died.",
    "requests_replayed": "Sequences that were open when an engine died, and went on with the next.",
}
"""Every metric there is, and what it counts. A name that is not here cannot be shown."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that only grows."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number that goes up and down."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """A distribution."""

    name: str
    labels: dict[str, str]
    count: int
    sum: float
    buckets: dict[str, int] = field(default_factory=dict[str, int])
    """Upper bound, as text, to how many values are not above it; the last is ``+Inf``."""


Metric = Counter | Gauge | Histogram


def metrics_of(snapshot: EngineSnapshot, cache: CacheConfig, model_name: str, engine_index: int = 0) -> list[Metric]:
    """All metrics of one engine at one moment.

    Args:
        snapshot: The engine's counters.
        cache: Shown as the labels of ``cache_config_info``.
        model_name: Label of every metric.
        engine_index: Label ``engine`` of every metric.
    """
    labels = _labels(model_name, engine_index)

    def gauge(name: str, value: float, **more: str) -> Gauge:
        return Gauge(PREFIX + name, {**labels, **more}, value)

    def counter(name: str, value: float, **more: str) -> Counter:
        return Counter(PREFIX + name, {**labels, **more}, value)

    computed = snapshot.prompt_tokens - snapshot.cached_prompt_tokens
    steps = snapshot.step_sizes or [0] * (len(TOKENS_PER_STEP) + 1)
    return [
        gauge("num_requests_running", snapshot.num_running),
        gauge("num_requests_waiting", snapshot.num_waiting),
        gauge("num_requests_waiting_by_reason", snapshot.num_waiting, reason="capacity"),
        gauge("kv_cache_usage_perc", kv_cache_usage(snapshot)),
        gauge(
            "cache_config_info",
            1,
            block_size=str(cache.block_size),
            cache_dtype=cache.kv_cache_dtype,
            enable_prefix_caching=str(cache.enable_prefix_caching),
            gpu_memory_utilization=str(cache.memory_utilization),
            num_gpu_blocks=str(snapshot.num_blocks),
            prefix_caching_hash_algo=cache.prefix_caching_hash_algo,
        ),
        counter("prompt_tokens", snapshot.prompt_tokens),
        counter("prompt_tokens_cached", snapshot.cached_prompt_tokens),
        counter("prompt_tokens_by_source", computed, source="local_compute"),
        counter("prompt_tokens_by_source", snapshot.cached_prompt_tokens, source="local_cache_hit"),
        counter("generation_tokens", snapshot.generation_tokens),
        counter("num_preemptions", snapshot.num_preemptions),
        counter("prefix_cache_queries", snapshot.prefix_queries),
        counter("prefix_cache_hits", snapshot.prefix_hits),
        counter("engine_steps", snapshot.num_steps),
        counter("engine_device_seconds", snapshot.forward_ms / 1000),
        *(
            counter("request_success", count, finished_reason=reason)
            for reason, count in sorted(snapshot.finished.items())
        ),
        *(counter("tenant_tokens", count, tenant=tenant) for tenant, count in sorted(snapshot.tenant_tokens.items())),
        _histogram("iteration_tokens_total", labels, TOKENS_PER_STEP, steps, snapshot.scheduled_tokens),
    ]


def request_metrics(stats: RequestStats, model_name: str, engine_index: int = 0) -> list[Metric]:
    """All metrics that frontends have counted.

    Args:
        stats: Of one process, or the sum of several.
        model_name: Label of every metric.
        engine_index: Label ``engine`` of every metric.
    """
    labels = _labels(model_name, engine_index)
    metrics: list[Metric] = [
        _histogram(name, labels, each.bounds, each.counts, each.total) for name, each in stats.histograms.items()
    ]
    metrics += [
        Counter(PREFIX + name, {**labels, **dict(more)}, value)
        for (name, more), value in sorted(stats.counters.items())
    ]
    return metrics


def _labels(model_name: str, engine_index: int) -> dict[str, str]:
    return {"model_name": model_name, "engine": str(engine_index)}


def _histogram(
    name: str, labels: dict[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Histogram:
    buckets, running = dict[str, int](), 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        running += count
        buckets["+Inf" if bound == float("inf") else str(float(bound))] = running
    return Histogram(PREFIX + name, dict(labels), running, float(total), buckets)

"""A snapshot as named metrics, under the names that dashboards for vLLM use, with our prefix.

``LLM.get_metrics()`` returns these objects; a Prometheus endpoint renders the same list. Only what the engine counts
by now is here. Rates are ``stats.py``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config.sections import CacheConfig
from octavo.messages import EngineSnapshot
from octavo.observability.stats import kv_cache_usage

PREFIX = "octavo:"


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that only grows."""

    name: str
    labels: dict[str, str]
    value: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number that goes up and down."""

    name: str
    labels: dict[str, str]
    value: float


Metric = Counter | Gauge


def metrics_of(snapshot: EngineSnapshot, cache: CacheConfig, model_name: str, engine_index: int = 0) -> list[Metric]:
    """All metrics of one engine at one moment.

    Args:
        snapshot: The engine's counters.
        cache: Shown as the labels of ``cache_config_info``.
        model_name: Label of every metric.
        engine_index: Label ``engine`` of every metric.
    """
    labels = {"model_name": model_name, "engine": str(engine_index)}

    def gauge(name: str, value: float, **more: str) -> Gauge:
        return Gauge(PREFIX + name, {**labels, **more}, value)

    def counter(name: str, value: int, **more: str) -> Counter:
        return Counter(PREFIX + name, {**labels, **more}, value)

    return [
        gauge("num_requests_running", snapshot.num_running),
        gauge("num_requests_waiting", snapshot.num_waiting),
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
        counter("generation_tokens", snapshot.generation_tokens),
        counter("num_preemptions", snapshot.num_preemptions),
        counter("prefix_cache_queries", snapshot.prefix_queries),
        counter("prefix_cache_hits", snapshot.prefix_hits),
        *(
            counter("request_success", count, finished_reason=reason)
            for reason, count in sorted(snapshot.finished.items())
        ),
    ]

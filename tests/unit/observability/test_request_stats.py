"""What a frontend counts of its requests, the sum over processes, and the page for Prometheus."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from octavo.config.sections import CacheConfig
from octavo.messages import EngineSnapshot
from octavo.observability.histogram import HistogramState
from octavo.observability.metrics import HELP, Histogram, metrics_of, request_metrics
from octavo.observability.prometheus import render
from octavo.observability.request_stats import BOUNDS, MAX_SERIES, RequestStats
from octavo.observability.shared import StatsShare
from octavo.outputs import RequestStateStats
from octavo.sampling_params import SamplingParams

CACHE = CacheConfig(16, "float32", True, "sha256", 0.9, None, None)


def finished_request(stats: RequestStats, *, num_tokens: int = 5, n: int = 1, **times: float) -> None:
    request: Any = SimpleNamespace(prompt_token_ids=[1] * 12, params=SamplingParams(max_tokens=64, n=n))
    state = RequestStateStats(arrival_time=1000.0, num_generation_tokens=num_tokens, **times)
    stats.finished(request, state, 8, 1003.0)


def values(stats: RequestStats) -> dict[str, Histogram]:
    return {each.name: each for each in request_metrics(stats, "tiny") if isinstance(each, Histogram)}


def test_buckets_hold_values_up_to_their_bound() -> None:
    state = HistogramState((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 7):
        state.observe(value)
    assert state.counts == [2, 1, 1, 1] and state.num_values == 5 and state.total == 15
    twin = state.copy()
    twin.merge([1, 0, 0, 1], 9)
    assert twin.counts == [3, 1, 1, 2] and twin.total == 24 and state.num_values == 5


def test_a_request_in_numbers() -> None:
    stats = RequestStats()
    stats.first_token(0.2)
    stats.later_tokens(0.05, 3)
    stats.later_tokens(0.05, 1)
    finished_request(stats, queued_ts=10.0, scheduled_ts=10.5, first_token_ts=11.0, last_token_ts=12.0)
    seen = values(stats)
    sums = {name.partition(":")[2]: round(each.sum, 6) for name, each in seen.items() if each.count}
    assert sums == {
        "time_to_first_token_seconds": 0.2, "inter_token_latency_seconds": 0.2, "e2e_request_latency_seconds": 3.0,
        "request_time_per_output_token_seconds": 0.25, "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 0.5, "request_inference_time_seconds": 1.5, "request_decode_time_seconds": 1.0,
        "request_prompt_tokens": 12, "request_generation_tokens": 5, "request_max_num_generation_tokens": 5,
        "request_params_n": 1, "request_params_max_tokens": 64, "request_prefill_kv_computed_tokens": 4,
    }  # fmt: skip
    gaps = seen["octavo:inter_token_latency_seconds"]
    assert gaps.count == 4 and gaps.buckets["0.05"] == 4 and gaps.buckets["0.025"] == 0 and gaps.buckets["+Inf"] == 4


def test_times_that_nobody_knows_are_not_counted() -> None:
    """Red when a request that a stop string ended, whose engine times are 0.0, is counted with nonsense latencies."""
    stats = RequestStats()
    finished_request(stats, first_token_ts=11.0, last_token_ts=12.0)
    seen = values(stats)
    assert seen["octavo:request_queue_time_seconds"].count == 0
    assert seen["octavo:request_prefill_time_seconds"].count == 0
    assert seen["octavo:request_decode_time_seconds"].count == 1


def test_every_metric_has_a_help_text_and_every_text_a_use() -> None:
    snapshot = EngineSnapshot(0.0, finished={"stop": 1}, tenant_tokens={"a": 3})
    shown = {each.name.removeprefix("octavo:") for each in metrics_of(snapshot, CACHE, "tiny")} | set(BOUNDS)
    assert shown <= set(HELP)
    counted_by_the_server = {"corrupted_requests", "http_requests", "engine_restarts", "requests_replayed"}
    assert set(HELP) - shown == counted_by_the_server


def test_endless_labels_end() -> None:
    stats = RequestStats()
    for index in range(3 * MAX_SERIES):
        stats.count("http_requests", route=f"/{index}")
    assert len(stats.counters) <= MAX_SERIES + 1
    assert sum(stats.counters.values()) == 3 * MAX_SERIES


def test_siblings_answer_for_each_other(tmp_path: Path) -> None:
    mine, other = RequestStats(), RequestStats()
    here, there = StatsShare(mine.record, str(tmp_path), 0), StatsShare(other.record, str(tmp_path), 1)
    mine.first_token(1.0)
    mine.count("http_requests", route="/health")
    other.first_token(2.0)
    other.count("http_requests", 2, route="/health")
    there.publish()
    total = here.total()
    assert total.histograms["time_to_first_token_seconds"].total == 3.0
    assert list(total.counters.values()) == [3]
    assert [record.num_open for record in here.others()] == [0]
    # One dies and another takes its place: no counter falls, and nothing counts twice.
    reborn = RequestStats()
    there = StatsShare(reborn.record, str(tmp_path), 1)
    reborn.first_token(4.0)
    there.publish()
    there.publish()
    assert here.total().histograms["time_to_first_token_seconds"].total == 7.0
    assert there.total().histograms["time_to_first_token_seconds"].total == 6.0  # the first has not published yet
    here.close()
    assert there.total().histograms["time_to_first_token_seconds"].total == 7.0


def test_a_damaged_file_of_a_sibling_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "stats-1.msgpack").write_bytes(b"\xc1garbage")
    stats = RequestStats()
    stats.first_token(1.0)
    share = StatsShare(stats.record, str(tmp_path), 0)
    assert share.total().histograms["time_to_first_token_seconds"].num_values == 1
    share.close()


def test_the_page_reads_back() -> None:
    stats = RequestStats()
    stats.first_token(0.3)
    stats.count("http_requests", 4, route="/v1/x", status="200", method="GET")
    snapshot = EngineSnapshot(
        0.0, num_running=2, num_blocks=11, num_free_blocks=5, generation_tokens=7, finished={"stop": 1, "length": 2},
        step_sizes=[0, 3] + [0] * 12, scheduled_tokens=9,
    )  # fmt: skip
    metrics = metrics_of(snapshot, CACHE, 'a "quoted"\\ name\n') + request_metrics(stats, 'a "quoted"\\ name\n')
    body = render(metrics, mirror=True, with_process=True)
    samples = {
        (sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")): sample
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    for prefix in ("octavo:", "vllm:"):
        assert samples[prefix + "generation_tokens_total", None, None].value == 7
        assert samples[prefix + "kv_cache_usage_perc", None, None].value == 0.5
        assert samples[prefix + "request_success_total", "length", None].value == 2
        assert samples[prefix + "iteration_tokens_total_bucket", None, "8.0"].value == 3
        assert samples[prefix + "iteration_tokens_total_sum", None, None].value == 9
        assert samples[prefix + "time_to_first_token_seconds_bucket", None, "0.25"].value == 0
        assert samples[prefix + "time_to_first_token_seconds_count", None, None].value == 1
        assert samples[prefix + "http_requests_total", None, None].value == 4
        label = samples[prefix + "num_requests_running", None, None].labels["model_name"]
        assert label == 'a "quoted"\\ name\n'
    assert samples["vllm:gpu_cache_usage_perc", None, None].value == 0.5
    assert samples["vllm:time_per_output_token_seconds_count", None, None].value == 0
    assert not any(name.startswith("octavo:gpu_") for name, _, _ in samples)
    assert samples["process_resident_memory_bytes", None, None].value > 0
    plain = render(metrics)
    assert b"vllm:" not in plain and b"process_" not in plain

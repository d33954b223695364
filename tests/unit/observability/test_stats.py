"""The log line that people grep for, and when there is none; metrics under the names that dashboards know."""

from __future__ import annotations

from octavo.config.sections import CacheConfig
from octavo.messages import EngineSnapshot
from octavo.observability.metrics import Counter, Gauge, metrics_of
from octavo.observability.stats import ThroughputMeter, throughput


def working(time_s: float, steps: int, **more: int) -> EngineSnapshot:
    return EngineSnapshot(
        time_s, num_running=2, num_waiting=1, num_blocks=101, num_free_blocks=75, num_steps=steps,
        prompt_tokens=100 * steps, generation_tokens=10 * steps, prefix_queries=80 * steps, prefix_hits=20 * steps,
        **more,
    )  # fmt: skip


def idle(time_s: float, steps: int) -> EngineSnapshot:
    return EngineSnapshot(
        time_s, num_blocks=101, num_free_blocks=100, num_steps=steps, prompt_tokens=100 * steps,
        generation_tokens=10 * steps,
    )  # fmt: skip


def test_one_line_per_interval_in_the_known_words() -> None:
    meter = ThroughputMeter(device_label="GPU")
    assert meter.record(working(100.0, 0)) is None
    assert meter.record(working(105.0, 5)) is None
    assert meter.record(working(110.0, 10)) == (
        "Engine 000: Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 10.0 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    assert meter.record(working(119.9, 20)) is None
    line = meter.record(working(120.0, 20, num_preemptions=3))
    assert line is not None and "Waiting: 1 reqs, Preemptions: 3, GPU KV cache" in line


def test_silent_when_nothing_was_done() -> None:
    meter = ThroughputMeter()
    meter.record(idle(0.0, 5))
    assert meter.record(idle(11.0, 5)) is None
    assert meter.record(idle(30.0, 5)) is None


def test_a_rest_is_not_counted_into_the_rate() -> None:
    # Red when 100 s of sleep are averaged into the throughput of the work before or after them.
    meter = ThroughputMeter()
    meter.record(working(0.0, 0))
    assert meter.record(idle(2.0, 4)) is None
    line = meter.record(working(102.0, 5))
    assert line is not None and "Avg generation throughput: 20.0 tokens/s" in line
    line = meter.record(working(112.0, 25))
    assert line is not None and "Avg generation throughput: 20.0 tokens/s" in line


def test_short_requests_now_and_then_give_a_line_per_interval_only() -> None:
    """Red when each rest ends with a line: a request every two seconds would fill the log."""
    meter, lines = ThroughputMeter(), list[str | None]()
    for index in range(10):
        lines.append(meter.record(working(3.0 * index, 5 * index)))
        lines.append(meter.record(idle(3.0 * index + 0.5, 5 * index + 4)))
    shown = [line for line in lines if line is not None]
    assert len(shown) == 2
    assert all("Avg generation throughput: 80.0 tokens/s" in line for line in shown)  # 40 tokens in each half second


def test_the_last_work_before_a_long_rest_gets_its_line() -> None:
    meter = ThroughputMeter()
    meter.record(working(0.0, 0))
    meter.record(idle(4.0, 8))
    assert meter.tick(9.9) is None
    line = meter.tick(10.0)
    assert line is not None and "Avg generation throughput: 20.0 tokens/s, Running: 0" in line
    assert meter.tick(20.0) is None and meter.tick(31.0) is None


def test_hit_rate_falls_back_to_the_whole_life() -> None:
    before, after = working(0.0, 10), working(1.0, 10)
    assert throughput(before, after).prefix_cache_hit_rate == 0.25
    assert throughput(EngineSnapshot(0.0), EngineSnapshot(1.0)).prefix_cache_hit_rate == 0.0


def test_metrics() -> None:
    cache = CacheConfig(16, "float32", True, "sha256", 0.9, None, None)
    snapshot = working(0.0, 3)
    snapshot.finished = {"stop": 2, "abort": 1}
    metrics = {(each.name, each.labels.get("finished_reason")): each for each in metrics_of(snapshot, cache, "tiny")}
    assert metrics["octavo:generation_tokens", None] == Counter(
        "octavo:generation_tokens", {"model_name": "tiny", "engine": "0"}, 30
    )
    usage = metrics["octavo:kv_cache_usage_perc", None]
    assert isinstance(usage, Gauge) and usage.value == 0.25
    assert metrics["octavo:request_success", "stop"].value == 2
    assert metrics["octavo:cache_config_info", None].labels["num_gpu_blocks"] == "101"

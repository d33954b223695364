"""octavo bench serve against a server over a real socket, and its numbers by hand."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import bench
from octavo.cli.bench_client import BenchClient, Load, Measurement, Overhead, Target, Timing
from octavo.cli.bench_report import doubts, percentile, summarize
from octavo.cli.bench_serve import main
from octavo.errors import ConfigError

from .fake_server import FakeServer


def load(**more: Any) -> Load:
    values: dict[str, Any] = {"request_rate": float("inf"), "burstiness": 1.0, "max_concurrency": None, "seed": 0}
    return Load(**{**values, **more})


def timing(start_s: float, ttft_s: float, *gaps_s: float, error: str | None = None) -> Timing:
    return Timing(
        start_s, start_s + ttft_s + sum(gaps_s), ttft_s, list(gaps_s), num_prompt_tokens=10,
        num_output_tokens=len(gaps_s) + 1, error=error,
    )  # fmt: skip


def test_numbers_by_hand() -> None:
    run = Measurement(
        [timing(0.0, 0.1, 0.2, 0.4), timing(0.5, 0.3, 0.1), timing(1.0, 0.9), timing(0.0, 0.0, error="no")],
        duration_s=2.0, overhead=Overhead(0.25, [0.001] * 99 + [0.5]), max_open=3,
    )  # fmt: skip
    result = summarize(run, ["ttft", "tpot", "itl", "e2el"], [50, 99], {"ttft": 500, "e2el": 600})
    assert (result["completed"], result["failed"], result["request_throughput"]) == (3, 1, 1.5)
    assert (result["total_input_tokens"], result["total_output_tokens"], result["output_throughput"]) == (30, 6, 3.0)
    assert result["mean_ttft_ms"] == pytest.approx(1300 / 3) and result["median_ttft_ms"] == pytest.approx(300)
    assert result["mean_tpot_ms"] == pytest.approx(200)  # 300 and 100; an answer of one token has none
    assert result["p50_itl_ms"] == pytest.approx(200) and result["p99_e2el_ms"] == pytest.approx(896)
    assert result["request_goodput"] == 0.5  # the second only: 400 ms in all, the first takes 700
    assert result["client"]["cpu_share"] == 0.25 and result["client"]["loop_lag_max_ms"] == pytest.approx(500)
    assert doubts(result) == []
    run.overhead = Overhead(0.95, [0.1] * 100)
    assert len(doubts(summarize(run, ["ttft"], [50], {}))) == 2


@pytest.mark.parametrize(("values", "share", "expected"), [
    ([], 99, 0.0), ([7.0], 1, 7.0), ([3.0, 1.0, 2.0], 50, 2.0), ([0.0, 10.0], 90, 9.0), ([1.0, 2.0], 100, 2.0),
])  # fmt: skip
def test_percentiles(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_everything_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--num-prompts", "12", "--random-input-len", "20", "--random-output-len", "5", "--random-range-ratio", "0.5",
        "--random-prefix-len", "3", "--ignore-eos", "--temperature", "0.5", "--extra-body", '{"seed": 7}',
        "--max-concurrency", "4", "--num-warmups", "2", "--goodput", "ttft:60000", "--save-detailed", "--result-dir",
        str(tmp_path), "--result-filename", "out.json", "--metadata", "machine_name=test", "--header", "X-Test=1",
        "--metric-percentiles", "50,99.9",
    ]  # fmt: skip
    with FakeServer() as server:
        assert bench.main(["serve", "--base-url", server.url, *flags]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["completed"] == 12 and result["failed"] == 0 and result["machine_name"] == "test"
    asked = server.requests[3:]  # a first one, and two to warm up
    assert result["total_output_tokens"] == sum(each["max_tokens"] for each in asked) == sum(result["output_lens"])
    assert result["total_input_tokens"] == sum(len(each["prompt"]) for each in asked)
    assert len({tuple(each["prompt"][:3]) for each in asked}) == 1 and len({len(each["prompt"]) for each in asked}) > 1
    assert asked[0]["seed"] == 7 and asked[0]["temperature"] == 0.5 and asked[0]["stream"] is True
    assert server.headers[-1]["x-test"] == "1"
    assert server.most_open <= 4 and result["max_concurrent_requests"] <= 4
    assert result["request_goodput"] == result["request_throughput"]
    assert 0 < result["median_ttft_ms"] < result["p99.9_e2el_ms"]
    assert len(result["itls"]) == 12 and len(result["itls"][0]) == result["output_lens"][0] - 1
    assert result["generated_texts"][0].startswith("word") and set(result["errors"]) == {""}
    assert result["client"]["cpu_share"] > 0
    out = capsys.readouterr().out
    assert "Time to first token" in out and "p99.9" in out and "Goodput" in out


def test_chat_and_files(tmp_path: Path) -> None:
    custom = tmp_path / "prompts.jsonl"
    custom.write_text('{"prompt": "Hello", "output_tokens": 3}\n\n{"prompt": "World"}\n')
    shared = tmp_path / "shared.json"
    talk = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "Like this, my friend."}]
    shared.write_text(json.dumps([{"conversations": talk}, {"conversations": talk[:1]}, {"id": 3}]))
    with FakeServer() as server:
        base = ["--base-url", server.url.removesuffix("/v1"), "--backend", "openai-chat", "--num-prompts", "3", "-q"]
        assert main([*base, "--dataset-name", "custom", "--dataset-path", str(custom), "--disable-shuffle"]) == 0
        asked = [(each["messages"][0]["content"], each["max_tokens"]) for each in server.requests]
        assert sorted(asked) == [("Hello", 3), ("Hello", 3), ("Hello", 3), ("World", 256)]
        server.requests.clear()
        assert main([*base, "--dataset-name", "sharegpt", "--dataset-path", str(shared)]) == 0
        assert {each["max_tokens"] for each in server.requests} == {5}
        server.requests.clear()
        assert main([*base, "--dataset-name", "lognormal", "--random-input-len", "10"]) == 0
        lengths = [len(each["messages"][0]["content"].split()) for each in server.requests]
        assert len(set(lengths)) > 1 and max(lengths) <= 80


def test_arrivals_keep_their_rate_and_their_evenness() -> None:
    """Red when requests are sent at once, or when burstiness changes nothing."""

    async def starts(burstiness: float) -> list[float]:
        target = Target(
            url=f"{server.url}/completions", is_chat=False, model="m", headers={}, extra_body={}, timeout_s=9
        )
        async with BenchClient(target) as client:
            from octavo.cli.bench_data import Sample

            samples = [Sample([1], 1, 1)] * 40
            run = await client.run(samples, load(request_rate=200.0, burstiness=burstiness, seed=3))
        assert all(each.error is None for each in run.timings)
        return [each.start_s - each.late_s - run.timings[0].start_s for each in run.timings]

    with FakeServer() as server:
        poisson, even = asyncio.run(starts(1.0)), asyncio.run(starts(1000.0))
    for planned in (poisson, even):
        assert 0.1 < planned[-1] - planned[0] < 0.4  # 39 gaps of 5 ms on the average
    gaps = [after - before for before, after in zip(even, even[1:], strict=False)]
    assert max(gaps) < 2 * min(gaps)
    gaps = [after - before for before, after in zip(poisson, poisson[1:], strict=False)]
    assert max(gaps) > 5 * min(gaps)


def test_failures_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    custom = tmp_path / "prompts.jsonl"
    prompts = ["fine", "refuse", "break", "garbage", "mute", "refuse"]
    custom.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    with FakeServer("one two three four") as server:
        base = ["--base-url", server.url.removesuffix("/v1"), "-q", "--dataset-name", "custom"]
        flags = ["--dataset-path", str(custom), "--num-prompts", "6", "--disable-shuffle"]
        assert main([*base, *flags, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r"]) == 0
    result = json.loads((tmp_path / "r").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 5, 4)
    err = capsys.readouterr().err
    assert "2 requests failed: status 400: " in err and "no, thank you" in err


def test_a_server_that_refuses_is_asked_once(tmp_path: Path) -> None:
    custom = tmp_path / "prompts.jsonl"
    custom.write_text('{"prompt": "refuse"}\n')
    with FakeServer() as server, pytest.raises(Exception, match="no more were sent: status 400"):
        main(
            [
                "--base-url",
                server.url.removesuffix("/v1"),
                "-q",
                "--dataset-name",
                "custom",
                "--dataset-path",
                str(custom),
            ]
        )
    assert len(server.requests) == 1


@pytest.mark.parametrize(("flags", "param"), [
    (["--num-prompts", "0"], "num_prompts"), (["--request-rate", "0"], "request_rate"),
    (["--burstiness", "-1"], "burstiness"), (["--goodput", "itl:3"], "goodput"), (["--goodput", "ttft"], "goodput"),
    (["--metric-percentiles", "101"], "metric_percentiles"), (["--percentile-metrics", "x"], "percentile_metrics"),
    (["--dataset-name", "custom", "--model", "m"], "dataset_path"),
    (["--extra-body", "[1]", "--model", "m"], "extra_body"),
    (["--header", "nonsense", "--model", "m"], "header"), (["--random-range-ratio", "1"], "random_range_ratio"),
])  # fmt: skip
def test_wrong_flags(flags: list[str], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(flags)
    assert caught.value.param == param


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_a_plot(tmp_path: Path) -> None:
    with FakeServer() as server:
        base = ["--base-url", server.url.removesuffix("/v1"), "-q", "--num-prompts", "4", "--random-input-len", "4"]
        assert main([*base, "--plot", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

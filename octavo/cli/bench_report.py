"""From the timings of ``octavo bench serve`` to numbers, a table, JSON under vLLM's keys, and a plot.

TTFT: time to first token. TPOT: mean time per output token after the first, one value per request. ITL: between two
chunks of text. E2EL: the whole request. All in milliseconds.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from octavo.cli.bench_client import Measurement, Timing
from octavo.errors import ConfigError

METRICS: Mapping[str, str] = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
MIN_DURATION_S = 1.0
"""In a shorter run the client's share says nothing: sending the requests is most of it."""
MAX_CPU_SHARE, MAX_LAG_MS = 0.8, 10.0
"""A client that needs more of its core, or is later than this (99th percentile), has bent what it measured."""


def samples_of(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """All values in milliseconds by metric, of the requests that succeeded."""
    good = [each for each in timings if each.error is None]
    return {
        "ttft": [each.ttft_s * 1000 for each in good],
        "tpot": [each.tpot_s * 1000 for each in good if each.tpot_s is not None],
        "itl": [gap * 1000 for each in good for gap in each.gaps_s],
        "e2el": [each.latency_s * 1000 for each in good],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest values; 0.0 of nothing.

    Args:
        values: In any order.
        share: 0 to 100.
    """
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def is_good(timing: Timing, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request succeeded within all limits."""
    if timing.error is not None:
        return False
    values = {"ttft": timing.ttft_s * 1000, "tpot": (timing.tpot_s or 0.0) * 1000, "e2el": timing.latency_s * 1000}
    return all(values[name] <= limit for name, limit in limits_ms.items())


def summarize(
    run: Measurement, metrics: Sequence[str], percentiles: Sequence[float], goodput: Mapping[str, float]
) -> dict[str, Any]:
    """The result under the keys of vLLM's ``bench serve``, and what the client cost.

    Args:
        run: What was measured.
        metrics: Names in METRICS.
        percentiles: Which, 0 to 100.
        goodput: Limit in milliseconds by metric; may be empty.
    """
    good = [each for each in run.timings if each.error is None]
    num_input, num_output = (
        sum(getattr(each, name) for each in good) for name in ("num_prompt_tokens", "num_output_tokens")
    )
    seconds = run.duration_s
    lags_ms, late_ms = (
        [value * 1000 for value in values] for values in (run.overhead.lags_s, [t.late_s for t in run.timings])
    )
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(run.timings) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(is_good(each, goodput) for each in run.timings) / seconds if goodput else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_concurrent_requests": run.max_open,
    }
    values = samples_of(run.timings)
    for name in metrics:
        result[f"mean_{name}_ms"] = statistics.fmean(values[name]) if values[name] else 0.0
        result[f"median_{name}_ms"] = percentile(values[name], 50)
        result[f"std_{name}_ms"] = statistics.pstdev(values[name]) if values[name] else 0.0
        for share in percentiles:
            result[f"p{share:g}_{name}_ms"] = percentile(values[name], share)
    result["client"] = {
        "cpu_share": run.overhead.cpu_share,
        "loop_lag_p99_ms": percentile(lags_ms, 99),
        "loop_lag_max_ms": max(lags_ms, default=0.0),
        "send_late_p99_ms": percentile(late_ms, 99),
    }
    return result


def doubts(result: Mapping[str, Any]) -> list[str]:
    """Why the numbers may be the client's rather than the server's."""
    client = result["client"]
    found: list[str] = []
    if client["cpu_share"] > MAX_CPU_SHARE and result["duration"] >= MIN_DURATION_S:
        found.append(f"this client used {client['cpu_share']:.0%} of a core: its limit may be what was measured")
    if client["loop_lag_p99_ms"] > MAX_LAG_MS:
        found.append(
            f"this client was up to {client['loop_lag_p99_ms']:.0f} ms late (99th percentile), and so are its times"
        )
    return found


def print_table(
    result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float], stream: IO[str]
) -> None:
    """Show a result to people."""
    console = Console(file=stream, width=None if stream.isatty() else 100)
    table = Table(title="octavo bench serve", show_header=False)
    rows: list[tuple[str, str]] = [
        ("Successful requests", f"{result['completed']:,}"),
        ("Failed requests", f"{result['failed']:,}"),
        ("Duration (s)", f"{result['duration']:.2f}"),
        ("Input tokens", f"{result['total_input_tokens']:,}"),
        ("Generated tokens", f"{result['total_output_tokens']:,}"),
        ("Requests/s", f"{result['request_throughput']:.2f}"),
        ("Output tokens/s", f"{result['output_throughput']:,.1f}"),
        ("Total tokens/s", f"{result['total_token_throughput']:,.1f}"),
        ("Most requests at once", f"{result['max_concurrent_requests']:,}"),
    ]
    if result["request_goodput"] is not None:
        rows.append(("Goodput (requests/s)", f"{result['request_goodput']:.2f}"))
    client = result["client"]
    rows.append(("This client", f"{client['cpu_share']:.0%} of a core, {client['loop_lag_p99_ms']:.1f} ms late (p99)"))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    times = Table("milliseconds", "mean", *(f"p{share:g}" for share in percentiles))
    for name in metrics:
        numbers = [result[f"mean_{name}_ms"]]
        numbers += [result[f"p{share:g}_{name}_ms"] for share in percentiles]
        times.add_row(METRICS[name], *(f"{number:,.2f}" for number in numbers))
    console.print(times)


def need_plotting() -> Any:
    """matplotlib, ready to draw into files.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'octavo[plot]'", param="plot") from None


def plot(run: Measurement, path: str) -> None:
    """Draw requests over time, tokens per second, and the distributions of the latencies.

    Args:
        run: What was measured.
        path: File; its ending says the format.
    """
    plt = need_plotting()
    figure, ((requests, rate), (spread, gaps)) = plt.subplots(2, 2, figsize=(12, 8))
    good = sorted((each for each in run.timings if each.error is None), key=lambda each: each.start_s)
    begin_s = min((each.start_s for each in good), default=0.0)
    starts = [each.start_s - begin_s for each in good]
    requests.barh(
        range(len(good)), [each.ttft_s for each in good], left=starts, color="tab:orange", label="to first token"
    )
    requests.barh(
        range(len(good)), [each.latency_s - each.ttft_s for each in good],
        left=[start + each.ttft_s for start, each in zip(starts, good, strict=True)], color="tab:blue", label="answer",
    )  # fmt: skip
    requests.set(title="Requests", xlabel="seconds", ylabel="request")
    requests.legend()
    arrivals: list[float] = []
    for each in good:
        now_s = each.start_s - begin_s + each.ttft_s
        arrivals.append(now_s)
        for gap in each.gaps_s:
            now_s += gap
            arrivals.append(now_s)
    rate.hist(arrivals, bins=100)
    rate.set(title="Chunks of text over time", xlabel="seconds", ylabel="chunks")
    for name, values in samples_of(run.timings).items():
        if not values:
            continue
        ordered = sorted(values)
        axis = gaps if name in ("itl", "tpot") else spread
        axis.plot(ordered, [100 * (index + 1) / len(ordered) for index in range(len(ordered))], label=METRICS[name])
    for axis in (spread, gaps):
        axis.set(xlabel="milliseconds", ylabel="% not slower")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

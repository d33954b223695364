"""The server under many clients, over an engine without a model: a JSON row per scenario, and whether it met its aim.

    python benchmarks/server/run.py [--scenarios NAMES] [--scale 1.0] [--out RESULTS.jsonl] [--log-dir DIR]

Wants a quiet machine: clients, server and engine share its cores. ``--scale 0.05`` tries the machinery in a minute and
proves nothing. What each scenario does is in its docstring; README.md has the aims in a table.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import send_floor
from harness import (
    FAKE,
    Client,
    Lag,
    Probe,
    Server,
    completion,
    connect,
    connect_many,
    quantile,
    raise_file_limit,
    run_loop,
)  # isort: skip

ROOMY = [*FAKE, "--max-num-seqs", "12000", "--max-num-batched-tokens", "16384", "--stall-timeout", "60"]
Aims = dict[str, tuple[float, str, float]]
"""What was measured, ``<=`` or ``>=``, and the aim."""


@dataclass(frozen=True)
class Scenario:
    """What to start and what to do with it."""

    run: Callable[[Server, float], Awaitable[tuple[dict[str, Any], Aims]]]
    flags: list[str]
    environment: dict[str, str]


async def streams(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """1,000 open streams at a token a second each."""
    count, tokens = max(10, int(1000 * scale)), 20
    before, lag = server.usage(), server.loop_lag()
    async with Probe(server.port) as probe:
        requests = (completion(f"Story {index}", tokens) for index in range(count))
        clients = await connect_many(server.port, requests, per_second=500)
        await asyncio.sleep(5)
        during = server.usage()
        await wait_closed(clients, 120)
    return {"streams": count, **seen(clients, probe)}, {
        "errors": (num_bad(clients, tokens), "<=", 0),
        "gap_p99_s": (quantile((each.result.max_gap_s for each in clients), 0.99), "<=", 1.5),
        "rss_rise_mb": (during.rss_mb - before.rss_mb, "<=", 60),
        **is_quick(server, probe, lag),
    }


async def idle_streams(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """5,000 open streams at a token in ten seconds each."""
    return await many_idle(server, max(10, int(5000 * scale)), all_open_s=15, rss_mb=150)


async def idle_streams_10k(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """10,000 of them."""
    return await many_idle(server, max(10, int(10000 * scale)), all_open_s=30, rss_mb=300)


async def many_idle(server: Server, count: int, *, all_open_s: float, rss_mb: float) -> tuple[dict[str, Any], Aims]:
    """Streams that come a thousand a second and then get a token now and then."""
    tokens = 3
    before, lag = server.usage(), server.loop_lag()
    begin_s = time.perf_counter()
    async with Probe(server.port) as probe:
        requests = (completion(f"Story {index}", tokens) for index in range(count))
        clients = await connect_many(server.port, requests, per_second=1000)
        await asyncio.wait([each.opened for each in clients], timeout=90)
        open_s = time.perf_counter() - begin_s
        during = server.usage()
        cpu_s, most_mb, latest_s = during.cpu_s - before.cpu_s, during.rss_mb, time.perf_counter() + 180
        while not all(each.closed.done() for each in clients) and time.perf_counter() < latest_s:
            await asyncio.sleep(2)
            most_mb = max(most_mb, (await asyncio.to_thread(server.usage)).rss_mb)
    rise = most_mb - before.rss_mb
    measured = {"streams": count, "rss_kb_per_stream": 1024 * rise / count, "cpu_ms_per_stream": 1000 * cpu_s / count}
    return {**measured, **seen(clients, probe)}, {
        "errors": (num_bad(clients, tokens), "<=", 0),
        "all_open_s": (open_s, "<=", all_open_s),
        "rss_rise_mb": (rise, "<=", rss_mb),
        **is_quick(server, probe, lag),
    }


async def token_cost(server: Server, scale: float, count: int = 200, tokens: int = 256) -> tuple[dict[str, Any], Aims]:
    """Streams at a steady pace: processor time of the HTTP process per streamed token, once all have begun. What their
    requests cost before, spread over their tokens, is in ``with_requests_us``; what a bare ``send`` costs here in
    ``floor_system_us``."""
    count = max(10, int(count * scale))
    await wait_closed(await connect_many(server.port, [completion("Warm", 32)] * 20, per_second=500), 60)
    before = server.usage()
    requests = (completion(f"Story {index}", tokens) for index in range(count))
    clients = await connect_many(server.port, requests, per_second=1000)
    await asyncio.wait([each.opened for each in clients], timeout=60)
    warm_tokens = 20 * 32
    begun_tokens = await asyncio.to_thread(server.metric, "generation_tokens_total") - warm_tokens
    begin_s, begun = time.perf_counter(), server.usage()
    num_events = sum(each.result.num_events for each in clients)
    await wait_closed(clients, 120)
    seconds, after = time.perf_counter() - begin_s, server.usage()
    total = count * tokens
    streamed = total - begun_tokens
    floor = await asyncio.to_thread(send_floor.measure, count)
    measured = {
        "streams": count, "tokens_per_s": streamed / seconds,
        "user_us_per_token": 1e6 * (after.cpu_s - after.system_s - begun.cpu_s + begun.system_s) / streamed,
        "system_us_per_token": 1e6 * (after.system_s - begun.system_s) / streamed,
        "tokens_per_event": streamed / max(1, sum(each.result.num_events for each in clients) - num_events),
        "with_requests_us": 1e6 * (after.cpu_s - before.cpu_s) / total,
        "engine_us_per_token": 1e6 * (after.engine_cpu_s - begun.engine_cpu_s) / streamed, **floor, **seen(clients),
    }  # fmt: skip
    return measured, {
        "errors": (num_bad(clients, tokens), "<=", 0),
        "http_us_per_token": (1e6 * (after.cpu_s - begun.cpu_s) / streamed, "<=", 10),
    }


async def slow_readers(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """8 clients stop reading four fast answers each; 8 good ones go on beside them. The system's buffers take what
    comes at first; then the server joins what it cannot send, and must neither pile up nor keep the engine busy for
    ever. The memory is the server's own and the system's for its connections."""
    count, tokens = max(2, int(8 * scale)), 6000
    good = await connect_many(
        server.port, (completion(f"Good {index}", tokens) for index in range(count)), per_second=500, keep_gaps=True
    )
    await asyncio.sleep(2)
    before, paused_s = server.usage(), time.perf_counter()
    requests = (completion(f"Slow {index}", 8000, n=4, temperature=0.5) for index in range(count))
    slow = await connect_many(server.port, requests, per_second=500, read_events=2, receive_buffer=4096)
    most_mb = most_unsent_mb = 0.0
    cut_off_s: float | None = None
    while time.perf_counter() - paused_s < 90 and cut_off_s is None:
        await asyncio.sleep(0.5)
        unsent_mb = server.unsent_bytes() / 2**20
        most_mb = max(most_mb, server.usage().rss_mb - before.rss_mb + unsent_mb)
        most_unsent_mb = max(most_unsent_mb, unsent_mb)
        running = await asyncio.to_thread(server.metric, "num_requests_running")
        if running <= sum(not each.closed.done() for each in good) and time.perf_counter() - paused_s > 3:
            cut_off_s = time.perf_counter() - paused_s
    finished = await asyncio.to_thread(server.metric, "request_success_total", 'finished_reason="length"')
    for each in slow:
        each.transport.abort()
    await wait_closed(good, 120)
    calm = [gap for each in good for at, gap in each.result.gaps if at < paused_s]
    beside = [gap for each in good for at, gap in each.result.gaps if at >= paused_s]
    measured = {
        "slow": count,
        "unsent_mb_per_slow_reader": most_unsent_mb / count,
        "gap_p99_before_s": quantile(calm, 0.99),
        "finished": finished,
    }
    measured |= seen(good)
    return measured, {
        "errors_of_good": (num_bad(good, tokens), "<=", 0),
        "mb_per_slow_reader": (most_mb / count, "<=", 1.0),
        "cut_off_after_s": (90.0 if cut_off_s is None else cut_off_s, "<=", 60),
        "gap_p99_rise_s": (quantile(beside, 0.99) - quantile(calm, 0.99), "<=", 0.1),
    }


async def slowloris(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """2,000 connections that never finish their headers, beside normal requests."""
    count = max(20, int(2000 * scale))
    half = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-"
    begin_s = time.perf_counter()
    hanging = await connect_many(server.port, [half] * count, per_second=1000)
    latencies: list[float] = []
    failed = 0
    while time.perf_counter() - begin_s < 8:
        asked_s = time.perf_counter()
        client = await connect(server.port, completion("Hello", 1, stream=False))
        await asyncio.wait([client.closed], timeout=10)
        failed += client.result.status != 200
        latencies.append(time.perf_counter() - asked_s)
        await asyncio.sleep(0.05)
    await asyncio.wait([each.closed for each in hanging], timeout=20)
    closed_s = time.perf_counter() - begin_s
    left = sum(not each.closed.done() for each in hanging)
    return {"half_open": count, "requests": len(latencies)}, {
        "failed": (failed, "<=", 0),
        "request_p99_s": (quantile(latencies, 0.99), "<=", 0.3),
        "never_closed": (left, "<=", 0),
        "last_closed_s": (closed_s, "<=", 12 + count / 1000),
    }


async def long_prompt(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """One prompt of 1 MB while 200 streams run."""
    count, tokens = max(10, int(200 * scale)), 600
    requests = (completion(f"Story {index}", tokens) for index in range(count))
    clients = await connect_many(server.port, requests, per_second=1000, keep_gaps=True)
    await asyncio.sleep(4)
    sent_s = time.perf_counter()
    text = "The quick brown fox jumps over the lazy dog. " * 23000
    client = await connect(server.port, completion(text[: 2**20], 1, stream=False))
    await asyncio.wait([client.closed], timeout=120)
    done_s = time.perf_counter()
    await wait_closed(clients, 120)
    before = [gap for each in clients for at, gap in each.result.gaps if sent_s - 2 < at < sent_s]
    during = [gap for each in clients for at, gap in each.result.gaps if sent_s <= at < max(done_s, sent_s + 0.5)]
    measured = {
        "streams": count, "status_of_long": client.result.status, "long_took_s": done_s - sent_s,
        "gap_p99_before_s": quantile(before, 0.99), "gap_max_during_s": max(during, default=0.0), **seen(clients),
    }  # fmt: skip
    return measured, {
        "errors": (num_bad(clients, tokens), "<=", 0),
        "status_of_long": (client.result.status, "<=", 200),
        "gap_p99_rise_s": (quantile(during, 0.99) - quantile(before, 0.99), "<=", 0.1),
    }


async def idle(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """Nothing to do: processor time of all processes."""
    await wait_closed([await connect(server.port, completion("Hello", 8))], 30)
    await asyncio.sleep(3)
    before, begin_s = server.usage(), time.perf_counter()
    await asyncio.sleep(max(3, 30 * scale))
    after, seconds = server.usage(), time.perf_counter() - begin_s
    share = (after.cpu_s + after.engine_cpu_s - before.cpu_s - before.engine_cpu_s) / seconds
    return {"seconds": seconds, "threads": after.num_threads, "rss_mb": after.rss_mb}, {
        "cpu_share": (share, "<=", 0.01),
    }


async def disconnect(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """500 streams whose clients vanish at once."""
    count = max(10, int(500 * scale))
    requests = (completion(f"Story {index}", 4000) for index in range(count))
    clients = await connect_many(server.port, requests, per_second=500)
    await asyncio.sleep(3)
    running = await asyncio.to_thread(server.metric, "num_requests_running")
    begin_s = time.perf_counter()
    for each in clients:
        each.transport.abort()
    free_s: float | None = None
    while time.perf_counter() - begin_s < 20 and free_s is None:
        found = await asyncio.to_thread(server.metrics)
        left = sum(
            value for name, value in found.items() if name.startswith(("octavo:num_requests", "octavo:kv_cache_u"))
        )
        if left == 0:
            free_s = time.perf_counter() - begin_s
        await asyncio.sleep(0.05)
    aborted = await asyncio.to_thread(server.metric, "request_success_total", 'finished_reason="abort"')
    return {"streams": count, "running_before": running}, {
        "all_free_s": (20.0 if free_s is None else free_s, "<=", 1.0),
        "not_counted_as_aborted": (abs(count - aborted), "<=", 0),
    }


async def overload(server: Server, scale: float) -> tuple[dict[str, Any], Aims]:
    """Ten times what the engine can do: who is let in is served in time, who is not hears so at once."""
    seconds, rate = max(3.0, 30 * scale), 640.0  # 32 rows, 10 ms a step, 50 tokens: 64 requests a second
    lag, late_s = server.loop_lag(), list[float]()

    async def watch_ourselves() -> None:
        while True:
            asked_s = time.perf_counter()
            await asyncio.sleep(0.01)
            late_s.append(time.perf_counter() - asked_s - 0.01)

    watch = asyncio.create_task(watch_ourselves())
    requests = (completion(f"Story {index}", 50) for index in range(int(rate * seconds)))
    begin_s = time.perf_counter()
    clients = await connect_many(server.port, requests, per_second=rate)
    await wait_closed(clients, 60)
    took_s = time.perf_counter() - begin_s
    watch.cancel()
    good = [each.result for each in clients if each.result.status == 200 and each.result.is_done]
    refused = [each.result for each in clients if each.result.status == 503]
    asked_s = time.perf_counter()
    last = await connect(server.port, completion("After", 1, stream=False))
    await asyncio.wait([last.closed], timeout=10)
    measured = {
        "asked": len(clients), "served": len(good), "refused": len(refused), "seconds": took_s,
        "ttft_p99_s": quantile((each.first_s - each.start_s for each in good), 0.99),
        "refused_p50_s": quantile((each.head_s - each.start_s for each in refused), 0.5),
        "loop_lag_p99_s": server.loop_lag().since(lag).quantile(0.99), "clients_lag_p99_s": quantile(late_s, 0.99),
    }  # fmt: skip
    return measured, {
        "neither_served_nor_refused": (len(clients) - len(good) - len(refused), "<=", 0),
        "refused_without_retry_after": (sum(each.retry_after is None for each in refused), "<=", 0),
        "refused_p99_s": (quantile((each.head_s - each.start_s for each in refused), 0.99), "<=", 0.05),
        "served_per_s_of_64": (len(good) / took_s / 64, ">=", 0.9),
        "recovery_s": (time.perf_counter() - asked_s, "<=", 5),
    }


async def wait_closed(clients: list[Client], timeout_s: float) -> None:
    """Until all are finished."""
    if clients:
        await asyncio.wait([each.closed for each in clients], timeout=timeout_s)


def num_bad(clients: list[Client], tokens: int) -> int:
    """How many did not get all of their tokens. Events may hold several: the count is an upper bound."""
    return sum(
        not (each.result.status == 200 and each.result.is_done and each.result.num_events <= tokens + 2)
        for each in clients
    )


def is_quick(server: Server, probe: Probe, before: Lag) -> Aims:
    """Whether the server was quick to answer all the while. The lag is the upper bound of the histogram's bucket."""
    lag = server.loop_lag().since(before)
    return {
        "health_p99_s": (quantile(probe.latencies_s, 0.99), "<=", 0.2),
        "loop_lag_p99_s": (lag.quantile(0.99), "<=", 0.05),
        "loop_lag_max_s": (lag.quantile(1.0), "<=", 0.25),
    }


def seen(clients: list[Client], probe: Probe | None = None) -> dict[str, Any]:
    """What goes into every row."""
    results = [each.result for each in clients]
    row: dict[str, Any] = {
        "ttft_p50_s": quantile((each.first_s - each.start_s for each in results if each.first_s), 0.5),
        "ttft_p99_s": quantile((each.first_s - each.start_s for each in results if each.first_s), 0.99),
        "statuses": {
            str(status): sum(each.status == status for each in results) for status in {each.status for each in results}
        },
    }
    if probe is not None:
        row |= {"health_failed": probe.num_failed, "health_max_s": max(probe.latencies_s, default=0.0)}
    return row


SCENARIOS: dict[str, Scenario] = {
    "streams": Scenario(streams, ROOMY, {"FAKE_STEP_MS": "1000", "FAKE_JOIN_MS": "200"}),
    "idle-streams": Scenario(idle_streams, ROOMY, {"FAKE_STEP_MS": "10000", "FAKE_JOIN_MS": "2000"}),
    "idle-streams-10k": Scenario(idle_streams_10k, ROOMY, {"FAKE_STEP_MS": "10000", "FAKE_JOIN_MS": "2000"}),
    "token-cost": Scenario(token_cost, ROOMY, {"FAKE_STEP_MS": "20"}),
    "token-cost-20": Scenario(functools.partial(token_cost, count=20), ROOMY, {"FAKE_STEP_MS": "20"}),
    "token-cost-1000": Scenario(functools.partial(token_cost, count=1000, tokens=64), ROOMY, {"FAKE_STEP_MS": "100"}),
    "token-cost-interval": Scenario(token_cost, [*ROOMY, "--stream-interval", "4"], {"FAKE_STEP_MS": "20"}),
    "token-flood": Scenario(functools.partial(token_cost, tokens=2000), ROOMY, {"FAKE_STEP_MS": "1"}),
    "slow-readers": Scenario(slow_readers, [*ROOMY, "--stream-stall-timeout", "10"], {"FAKE_STEP_MS": "5"}),
    "slowloris": Scenario(slowloris, ROOMY, {"FAKE_STEP_MS": "5"}),
    "long-prompt": Scenario(
        long_prompt,
        [*ROOMY, "--hf-overrides", '{"max_position_embeddings": 1000000}'],
        {"FAKE_STEP_MS": "20"},
    ),
    "idle": Scenario(idle, ROOMY, {"FAKE_STEP_MS": "5"}),
    "disconnect": Scenario(disconnect, ROOMY, {"FAKE_STEP_MS": "20"}),
    "overload": Scenario(
        overload, [*FAKE, "--max-num-seqs", "32", "--max-num-queued-reqs", "32"], {"FAKE_STEP_MS": "10"}
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default="all", help=f"With commas between: {', '.join(SCENARIOS)}.")
    parser.add_argument("--scale", type=float, default=1.0, help="Of the number of clients.")
    parser.add_argument("--out", type=Path, help="Rows are appended there.")
    parser.add_argument("--log-dir", type=Path, help="Servers' logs.")
    options = parser.parse_args()
    raise_file_limit()
    names = list(SCENARIOS) if options.scenarios == "all" else options.scenarios.split(",")
    failed = 0
    for name in names:
        scenario = SCENARIOS[name]
        log = None if options.log_dir is None else options.log_dir / f"{name}.log"
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        with Server(scenario.flags, environment=scenario.environment, log=log) as server:
            measured, aims = run_loop(scenario.run(server, options.scale))
            alive = server.process.poll() is None
        met = {key: value <= aim if sign == "<=" else value >= aim for key, (value, sign, aim) in aims.items()}
        row = {
            "scenario": name, "scale": options.scale, "met": alive and all(met.values()),
            "aims": {key: {"value": value, sign: aim, "met": met[key]} for key, (value, sign, aim) in aims.items()},
            **measured, "server_alive": alive, "start_s": server.start_s, "cores": os.cpu_count(),
            "load_1m": os.getloadavg()[0], "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        failed += not row["met"]
        line = json.dumps(row)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(line + "\n")
        missed = [key for key, good in met.items() if not good]
        print(f"{name}: {'all aims met' if row['met'] else 'missed: ' + ', '.join(missed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

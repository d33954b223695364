"""Twenty thousand short requests with cancels: memory flat after warm-up, nothing lost, all books balanced.

    python benchmarks/server/soak.py [--requests 20000] [--clients 32] [--fake] [--out RESULTS.jsonl] [--log FILE]

Real SmolLM2-135M, or with ``--fake`` the engine without a model. Of the requests 30 % are left at a random point (while
queued, while running, or streaming), 20 % ask for several answers, 20 % begin alike, half are streamed and 5 % are
wrong. Memory is sampled all the time; the first fifth is warm-up. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import FAKE, MODEL, Server, Usage, connect, post_bytes, raise_file_limit, run_loop

SHARED = "You are a patient teacher. Answer the question of your pupil in one short sentence. " * 3
MAX_RISE_MB = 20.0
MAX_SLOPE_MB = 1.0
"""Per 10,000 requests, by a straight line through the samples after warm-up."""
SMALL_CACHE = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(256 << 20)]
"""Used all over before the warm-up ends: the system counts memory of the cache once it has been written."""


class Soak:
    """Clients that ask one after another.

    Args:
        server: That is asked.
        options: Of the command line.
    """

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server = server
        self._options = options
        self._next = 0
        self._draw = random.Random(0)
        self.counts = {"finished": 0, "left": 0, "refused": 0, "lost": 0}
        self.samples: list[tuple[int, Usage]] = []

    async def run(self) -> None:
        """Until all have been asked."""
        sampler = asyncio.create_task(self._sample())
        await asyncio.gather(*(self._ask_all() for _ in range(self._options.clients)))
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)

    async def _sample(self) -> None:
        every = max(1, self._options.requests // 100)
        due = 0
        while True:
            if self._next >= due:
                self.samples.append((self._next, await asyncio.to_thread(self._server.usage)))
                due = self._next + every
            await asyncio.sleep(0.2)

    async def _ask_all(self) -> None:
        while self._next < self._options.requests:
            index = self._next
            self._next += 1
            await self._ask(index)

    async def _ask(self, index: int) -> None:
        draw = self._draw
        is_wrong, is_streamed = draw.random() < 0.05, draw.random() < 0.5
        leaves_after_s = draw.random() * 0.5 if draw.random() < 0.3 else None
        body: dict[str, Any] = {
            "model": MODEL, "prompt": (SHARED if draw.random() < 0.2 else "") + f"Question {index}: why?",
            "max_tokens": draw.randint(1, 12), "stream": is_streamed, "temperature": draw.choice([0.0, 0.8]),
            "n": draw.randint(2, 4) if draw.random() < 0.2 else 1,
        }  # fmt: skip
        if body["temperature"] == 0.0:
            body["n"] = 1
        if is_wrong:
            body["max_tokens"] = -1
        client = await connect(self._server.port, post_bytes("/v1/completions", body))
        if leaves_after_s is not None and not is_wrong:
            await asyncio.wait([client.closed], timeout=leaves_after_s)
            if not client.closed.done():
                client.transport.abort()
                self.counts["left"] += 1
                return
        await asyncio.wait([client.closed], timeout=300)
        result = client.result
        if is_wrong:
            self.counts["refused" if result.status == 400 else "lost"] += 1
        elif result.status == 200 and (result.is_done or not is_streamed):
            self.counts["finished"] += 1
        else:
            self.counts["lost"] += 1


def slope(points: list[tuple[int, float]]) -> float:
    """MB per 10,000 requests, by least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 10_000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def balance(server: Server) -> dict[str, float]:
    """What must be nothing once all is over."""
    deadline_s = time.monotonic() + 30
    while True:
        metrics = server.metrics()
        books = {
            name: sum(value for key, value in metrics.items() if key.startswith(f"octavo:{name}{{"))
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        if not any(books.values()) or time.monotonic() > deadline_s:
            return books
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--fake", action="store_true", help="The engine without a model.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    raise_file_limit()
    flags = FAKE if options.fake else SMALL_CACHE
    with Server(flags, environment={"FAKE_STEP_MS": "2"}, log=options.log) as server:
        before, begin_s = server.usage(), time.perf_counter()
        soak = Soak(server, options)
        run_loop(soak.run())
        seconds = time.perf_counter() - begin_s
        books = balance(server)
        time.sleep(3)
        after = server.usage()
        finished = server.metric("request_success_total")
        errors = server.metric("request_success_total", 'finished_reason="error"')
        alive = server.process.poll() is None
    warm = [(count, usage) for count, usage in soak.samples if count >= options.requests / 5] or soak.samples
    slopes = {
        name: slope([(count, getattr(usage, name)) for count, usage in warm]) for name in ("rss_mb", "engine_rss_mb")
    }
    rises = {name: getattr(after, name) - getattr(warm[0][1], name) for name in slopes}
    checks = {
        "nothing lost": soak.counts["lost"] == 0 and errors == 0,
        "all accounted for": sum(soak.counts.values()) == options.requests,
        "books balanced": not any(books.values()),
        "memory flat": all(each <= MAX_RISE_MB for each in rises.values())
        and all(each <= MAX_SLOPE_MB for each in slopes.values()),
        "files back": after.num_fds <= before.num_fds + 5,
        "server alive": alive,
    }
    row = {
        "soak": "fake" if options.fake else MODEL, "requests": options.requests, "clients": options.clients,
        "seconds": seconds, "requests_per_s": options.requests / seconds, "counts": soak.counts,
        "sequences_finished": finished, "met": all(checks.values()), "checks": checks, "books": books,
        "mb_per_10000_requests": slopes, "mb_since_warm_up": rises, "before": asdict(before), "after": asdict(after),
        "samples": [[count, round(each.rss_mb, 1), round(each.engine_rss_mb, 1)] for count, each in soak.samples],
        "cores": os.cpu_count(), "load_1m": os.getloadavg()[0], "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    line = json.dumps(row)
    print(line)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(line + "\n")
    for name, good in checks.items():
        print(f"{'ok  ' if good else 'MISS'} {name}", file=sys.stderr)
    return 0 if row["met"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""From counters that only grow to numbers for people: rates between two snapshots, and the line in the log.

The core publishes an ``EngineSnapshot`` a few times a second while it works; whoever wants rates feeds them to a meter
of its own. Knows no engine and no clock: time is what the snapshots say. Metrics by name are in ``metrics.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from octavo.messages import EngineSnapshot

LOG_INTERVAL_S = 10.0
REST_S = 1.0
"""An engine that was idle and is silent for longer than this has rested: the time is not counted into a rate."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What happened between two snapshots, and how things stood at the later one."""

    seconds: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    num_running: int
    num_waiting: int
    num_preemptions: int
    """In these seconds."""
    kv_cache_usage: float
    """Share of the blocks that requests hold, 0 to 1."""
    prefix_cache_hit_rate: float
    """Share of the tokens looked up that were found, 0 to 1; since the start where nothing was looked up."""


def throughput(before: EngineSnapshot, after: EngineSnapshot) -> Throughput:
    """Rates from one snapshot of an engine to a later one."""
    seconds = max(after.time_s - before.time_s, 1e-9)
    queries, hits = after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits
    if not queries:
        queries, hits = after.prefix_queries, after.prefix_hits
    return Throughput(
        seconds=seconds,
        prompt_tokens_per_s=(after.prompt_tokens - before.prompt_tokens) / seconds,
        generation_tokens_per_s=(after.generation_tokens - before.generation_tokens) / seconds,
        num_running=after.num_running,
        num_waiting=after.num_waiting,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        kv_cache_usage=kv_cache_usage(after),
        prefix_cache_hit_rate=hits / queries if queries else 0.0,
    )


def kv_cache_usage(snapshot: EngineSnapshot) -> float:
    """Share of the KV blocks that requests hold, 0 to 1. The null block counts neither way."""
    usable = snapshot.num_blocks - 1
    return 1.0 - snapshot.num_free_blocks / usable if usable > 0 else 0.0


@dataclass(slots=True)
class _Rest:
    """What happened from the last moment before a rest to the first snapshot after it: counted into no rate."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    def add(self, before: EngineSnapshot, after: EngineSnapshot) -> None:
        self.seconds += after.time_s - before.time_s
        self.prompt_tokens += after.prompt_tokens - before.prompt_tokens
        self.generation_tokens += after.generation_tokens - before.generation_tokens


class ThroughputMeter:
    """Turns a stream of snapshots into one log line per interval in which something was done.

    Args:
        engine_index: Which engine, for the line.
        device_label: ``GPU`` or nothing; the words before ``KV cache usage``.
        interval_s: Seconds between two lines.
    """

    def __init__(self, engine_index: int = 0, device_label: str = "", interval_s: float = LOG_INTERVAL_S) -> None:
        self._prefix = f"Engine {engine_index:03d}"
        self._cache_label = f"{device_label} KV cache usage".strip()
        self._interval_s = interval_s
        self._start: EngineSnapshot | None = None
        self._last: EngineSnapshot | None = None
        self._rest = _Rest()
        self._due_s = 0.0

    def record(self, snapshot: EngineSnapshot) -> str | None:
        """Take note of a snapshot; the line to log when an interval has passed, None otherwise."""
        last, self._last = self._last, snapshot
        if last is None:
            self._start = snapshot
            self._due_s = snapshot.time_s + self._interval_s
            return None
        if _is_idle(last) and snapshot.time_s - last.time_s > REST_S:
            self._rest.add(last, snapshot)
        return self.tick(snapshot.time_s)

    def tick(self, now_s: float) -> str | None:
        """The line to log when an interval has passed, also while no snapshot comes because nothing is done.

        Args:
            now_s: On the clock of the snapshots.
        """
        start, last = self._start, self._last
        if start is None or last is None or now_s < self._due_s:
            return None
        line = self._line(start, last)
        self._start, self._rest, self._due_s = last, _Rest(), now_s + self._interval_s
        return line

    def _line(self, before: EngineSnapshot, after: EngineSnapshot) -> str | None:
        if after.num_steps == before.num_steps:
            return None
        rest = self._rest
        working = msgspec.structs.replace(
            before,
            time_s=before.time_s + rest.seconds,
            prompt_tokens=before.prompt_tokens + rest.prompt_tokens,
            generation_tokens=before.generation_tokens + rest.generation_tokens,
        )
        now = throughput(working, after)
        preemptions = f"Preemptions: {now.num_preemptions}, " if now.num_preemptions else ""
        return (
            f"{self._prefix}: Avg prompt throughput: {now.prompt_tokens_per_s:.1f} tokens/s, "
            f"Avg generation throughput: {now.generation_tokens_per_s:.1f} tokens/s, "
            f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, {preemptions}"
            f"{self._cache_label}: {now.kv_cache_usage:.1%}, "
            f"Prefix cache hit rate: {now.prefix_cache_hit_rate:.1%}"
        )


def _is_idle(snapshot: EngineSnapshot) -> bool:
    return not snapshot.num_running and not snapshot.num_waiting

"""Sends the requests of ``octavo bench serve`` at their times and notes when what came back; and what that cost itself.

One asyncio thread over aiohttp. A chunk's time is taken when its bytes arrive, before they are looked at. The client
measures its own lateness and processor share, because a client that is too slow looks like a slow server. Knows no
statistics.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from octavo.cli.bench_data import Sample

PROBE_S = 0.02
"""The loop is asked so often whether it is late."""
MAX_ERROR_CHARS = 300


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class Timing:
    """What became of one request. Times are ``time.perf_counter()`` seconds."""

    start_s: float = 0.0
    end_s: float = 0.0
    """Of the last token."""
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list[float])
    """Between chunks with text."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str | None = None
    late_s: float = 0.0
    """How much later than planned it was sent."""

    @property
    def latency_s(self) -> float:
        """From sending to the last token."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for an answer of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to ask."""

    url: str
    is_chat: bool
    model: str
    headers: dict[str, str]
    extra_body: dict[str, Any]
    """Fields of every request."""
    timeout_s: float
    keep_text: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How to send."""

    request_rate: float
    """Requests per second; infinity for all at once."""
    burstiness: float
    """Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is more even."""
    max_concurrency: int | None
    seed: int


@dataclass(slots=True)
class Overhead:
    """What the client itself cost."""

    cpu_share: float = 0.0
    """Processor seconds per second."""
    lags_s: list[float] = field(default_factory=list[float])
    """How late the loop was, sampled all the time."""


@dataclass(slots=True)
class Measurement:
    """One run."""

    timings: list[Timing]
    duration_s: float
    overhead: Overhead
    max_open: int = 0
    """Most requests in flight."""


class BenchClient:
    """Sends requests to one server. Use as an async context manager.

    Args:
        target: Where to.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._num_open = self._max_open = 0

    async def __aenter__(self) -> BenchClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout_s),
            headers=self._target.headers,
            read_bufsize=2**20,
            trust_env=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def run(
        self, samples: Sequence[Sample], load: Load, on_done: Callable[[Timing], None] = lambda _: None
    ) -> Measurement:
        """Send all requests and wait for all answers.

        Args:
            samples: In the order of sending.
            load: When.
            on_done: Called with each that has ended.
        """
        gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None
        overhead = Overhead()
        probe = asyncio.create_task(_probe(overhead.lags_s))
        self._max_open = 0
        cpu_before, begin_s = _cpu_s(), time.perf_counter()

        async def gated(sample: Sample, planned_s: float) -> Timing:
            async with gate or nullcontext():
                timing = await self._send(sample)
            if gate is None:  # under a limit of concurrency a request may wait for its turn
                timing.late_s = timing.start_s - planned_s
            on_done(timing)
            return timing

        tasks: list[asyncio.Task[Timing]] = []
        for sample, planned_s in zip(samples, _send_times(len(samples), load), strict=True):
            wait_s = begin_s + planned_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(gated(sample, begin_s + planned_s)))
        timings = list(await asyncio.gather(*tasks))
        duration_s = time.perf_counter() - begin_s
        overhead.cpu_share = (_cpu_s() - cpu_before) / duration_s
        probe.cancel()
        return Measurement(timings, duration_s, overhead, self._max_open)

    async def _send(self, sample: Sample) -> Timing:
        timing = Timing(num_prompt_tokens=sample.num_prompt_tokens)
        self._num_open += 1
        self._max_open = max(self._max_open, self._num_open)
        data = self._body(sample)
        timing.start_s = timing.end_s = time.perf_counter()
        try:
            async with self._session.post(
                self._target.url, data=data, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    text = (await response.content.read(4096)).decode("utf-8", "replace")
                    timing.error = f"status {response.status}: {text[:MAX_ERROR_CHARS]}"
                else:
                    reader = _AnswerReader(timing, self._target.keep_text)
                    async for data in response.content.iter_any():
                        reader.feed(data, time.perf_counter())
                    reader.end()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            timing.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
        finally:
            self._num_open -= 1
        if timing.error is None and not timing.ttft_s:
            timing.error = "no token came"
        return timing

    def _body(self, sample: Sample) -> bytes:
        target = self._target
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": sample.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **target.extra_body,
        }
        if target.is_chat:
            body["messages"] = [{"role": "user", "content": sample.prompt}]
        else:
            body["prompt"] = sample.prompt
        return json.dumps(body).encode()


class _AnswerReader:
    """Takes one stream of events in, as its bytes arrive.

    Args:
        timing: Filled in.
        keep_text: Whether anybody wants the text.
    """

    def __init__(self, timing: Timing, keep_text: bool) -> None:
        self._timing = timing
        self._keep_text = keep_text
        self._rest = b""
        self._last_s = 0.0
        self._num_chunks = 0
        self._is_done = False
        self._usage: _Usage | None = None
        self._pieces: list[str] = []

    def feed(self, data: bytes, now_s: float) -> None:
        """Bytes that arrived at ``now_s``."""
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            value = _data_of(event)
            if value == b"[DONE]":
                self._is_done = True
            elif value is not None:
                self._take(_decode(value), now_s)

    def end(self) -> None:
        """Nothing more comes."""
        timing = self._timing
        if not self._is_done and timing.error is None:
            timing.error = "the answer broke off"
        timing.text = "".join(self._pieces)
        timing.num_output_tokens = self._num_chunks
        if self._usage is not None:
            timing.num_prompt_tokens = self._usage.prompt_tokens or timing.num_prompt_tokens
            timing.num_output_tokens = self._usage.completion_tokens or self._num_chunks

    def _take(self, chunk: _Chunk, now_s: float) -> None:
        timing = self._timing
        if chunk.error is not None:
            timing.error = str(chunk.error)[:MAX_ERROR_CHARS]
        self._usage = chunk.usage or self._usage
        text = _text_of(chunk)
        if text is None:
            return
        self._num_chunks += 1
        if self._last_s:
            timing.gaps_s.append(now_s - self._last_s)
        else:
            timing.ttft_s = now_s - timing.start_s
        self._last_s = timing.end_s = now_s
        if self._keep_text:
            self._pieces.append(text)


def _data_of(event: bytes) -> bytes | None:
    """The data of an event; None for a comment."""
    if event.startswith(b"data:"):
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _text_of(chunk: _Chunk) -> str | None:
    """The text of a chunk; None for one that brings no token: a role, a finish reason or usage."""
    for choice in chunk.choices:
        delta = choice.delta
        text = choice.text if delta is None else delta.content or delta.reasoning or delta.reasoning_content
        if text:
            return text
    return None


def _send_times(count: int, load: Load) -> list[float]:
    """Seconds after the start."""
    if load.request_rate == float("inf"):
        return [0.0] * count
    draw = random.Random(load.seed)
    times, now = list[float](), 0.0
    for _ in range(count):
        times.append(now)
        now += draw.gammavariate(load.burstiness, 1 / (load.request_rate * load.burstiness))
    return times


async def _probe(lags_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + PROBE_S
        await asyncio.sleep(PROBE_S)
        lags_s.append(max(0.0, time.perf_counter() - due_s))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

"""A server to be measured, and clients that cost little: what the scenarios and the soak have in common.

Clients speak HTTP/1.1 over bare asyncio protocols: a stream is one small object that counts events and notes times.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from octavo.checkpoint.locate import locate_model
from octavo.cli.bench_data import COMMON_WORDS
from octavo.frontend.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = "smollm2-135m"
FAKE = ["--distributed-executor-backend", "fake_executor:FakeExecutor"]


def raise_file_limit() -> int:
    """As many open files as allowed, here and in children; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def word_ids(model: str) -> list[int]:
    """Token ids that are whole words, so that each token is text at once."""
    tokenizer = load_tokenizer(locate_model(model).path, None)
    encoded = (tokenizer.encode(f" {word}", add_special_tokens=False) for word in COMMON_WORDS)
    return [ids[0] for ids in encoded if len(ids) == 1]


@dataclass(frozen=True)
class Usage:
    """What the processes of a server hold and have used."""

    rss_mb: float
    """Of the HTTP processes."""
    engine_rss_mb: float
    cpu_s: float
    """Of the HTTP processes,"""
    system_s: float
    """the kernel's part of it."""
    engine_cpu_s: float
    num_fds: int
    num_threads: int


class Server:
    """``octavo serve`` in a process of its own. Use as a context manager.

    Args:
        flags: Beside port and model.
        model: What to serve.
        environment: Beside this process's.
        log: Where its log goes.
    """

    def __init__(
        self, flags: Iterable[str], *, model: str = MODEL, environment: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:  # fmt: skip
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "octavo.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-uvicorn-access-log", *flags,
        ]  # fmt: skip
        paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        if set(FAKE) <= set(self._command):
            self._environment["FAKE_TOKEN_IDS"] = ",".join(map(str, word_ids(model)))
        self._log = log
        self.start_s = 0.0

    def __enter__(self) -> Server:
        begin_s = time.monotonic()
        out: Any = subprocess.DEVNULL if self._log is None else self._log.open("w")
        self.process = subprocess.Popen(self._command, env=self._environment, stdout=out, stderr=out)
        while not self.is_healthy():
            if self.process.poll() is not None:
                tail = "" if self._log is None else self._log.read_text()[-2000:]
                raise RuntimeError(f"the server ended with {self.process.returncode}: {tail}")
            time.sleep(0.1)
        self.start_s = time.monotonic() - begin_s
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def usage(self) -> Usage:
        """Of now."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        rss, cpu, system_s, fds, threads = [0.0, 0.0], [0.0, 0.0], 0.0, 0, 0
        for process in family:
            try:
                is_engine = "octavo.engine.core_main" in process.cmdline()
                times = process.cpu_times()
                rss[is_engine] += process.memory_info().rss / 2**20
                cpu[is_engine] += times.user + times.system
                system_s += 0.0 if is_engine else times.system
                fds, threads = fds + process.num_fds(), threads + process.num_threads()
            except psutil.Error:
                continue
        return Usage(rss[0], rss[1], cpu[0], system_s, cpu[1], fds, threads)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` but buckets: name and labels to value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        samples = (
            line.rpartition(" ") for line in lines if line and not line.startswith("#") and "_bucket" not in line
        )
        return {name: float(value) for name, _, value in samples}

    def unsent_bytes(self) -> int:
        """What the system holds for this server's clients: sent by the server and not taken by them."""
        with open("/proc/net/tcp") as table:
            rows = [line.split() for line in table][1:]
        return sum(int(row[4].partition(":")[0], 16) for row in rows if int(row[1].partition(":")[2], 16) == self.port)

    def loop_lag(self) -> Lag:
        """Of the HTTP process that answers, from its start."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = (line for line in lines if line.startswith("octavo:event_loop_lag_seconds_bucket"))
        return Lag(
            {float(line.partition('le="')[2].partition('"')[0]): float(line.rpartition(" ")[2]) for line in found}
        )

    def metric(self, name: str, *labels: str) -> float:
        """Sum of the samples of ``octavo:name`` whose labels hold all of these texts."""
        return sum(
            value
            for key, value in self.metrics().items()
            if key.partition("{")[0] == f"octavo:{name}" and all(label in key for label in labels)
        )


@dataclass
class Result:
    """What one client saw. Times are ``time.perf_counter()``."""

    start_s: float = 0.0
    head_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    max_gap_s: float = 0.0
    num_events: int = 0
    status: int = 0
    is_done: bool = False
    gaps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """When, and how long, if kept."""
    body: bytes = b""
    retry_after: str | None = None


class Client(asyncio.Protocol):
    """One request on a connection of its own.

    Args:
        request: All bytes to send.
        keep_gaps: Remember each gap.
        read_events: Take nothing after so many events; None reads all.
        leave_after: Close the connection after so many events.
    """

    def __init__(
        self, request: bytes, *, keep_gaps: bool = False, read_events: int | None = None, leave_after: int | None = None
    ) -> None:
        self.result = Result(start_s=time.perf_counter())
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._keep_gaps = request, keep_gaps
        self._read_events, self._leave_after = read_events, leave_after
        self._head = b""
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s, result = time.perf_counter(), self.result
        if not result.head_s:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(self._head[:end], now_s)
            data = self._head[end + 4 :]
        if result.status != 200:
            result.body += data
            return
        self._tail = (self._tail + data)[-64:]
        result.is_done = result.is_done or b"[DONE]" in self._tail
        count = data.count(b"data: {")
        if count:
            self._note(count, now_s)
        if self._read_events is not None and result.num_events >= self._read_events:
            self.transport.pause_reading()
        if self._leave_after is not None and result.num_events >= self._leave_after:
            self.transport.abort()
        elif result.is_done:
            self.transport.close()

    def _read_head(self, head: bytes, now_s: float) -> None:
        self.result.head_s = now_s
        self.result.status = int(head[9:12])
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"retry-after:"):
                self.result.retry_after = line.partition(b":")[2].strip().decode()
        if not self.opened.done():
            self.opened.set_result(None)

    def _note(self, count: int, now_s: float) -> None:
        result = self.result
        result.num_events += count
        if result.last_s:
            gap = now_s - result.last_s
            result.max_gap_s = max(result.max_gap_s, gap)
            if self._keep_gaps:
                result.gaps.append((now_s, gap))
        else:
            result.first_s = now_s
        result.last_s = now_s

    def connection_lost(self, _error: Exception | None) -> None:
        for future in (self.opened, self.closed):
            if not future.done():
                future.set_result(None)


def post_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    """An HTTP request as bytes."""
    data = json.dumps(body).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(data)}\r\n{more}\r\n"
    )
    return head.encode() + data


def completion(prompt: str | list[int], max_tokens: int, *, stream: bool = True, **more: Any) -> bytes:
    """A text completion that runs to its full length."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream, **more}
    return post_bytes("/v1/completions", body)


async def connect(port: int, request: bytes, receive_buffer: int | None = None, **options: Any) -> Client:
    """Send a request; its client is there as soon as the connection is."""
    loop = asyncio.get_running_loop()
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await loop.sock_connect(raw, ("127.0.0.1", port))
    _, client = await loop.create_connection(lambda: Client(request, **options), sock=raw)
    return client


async def connect_many(port: int, requests: Iterable[bytes], *, per_second: float, **options: Any) -> list[Client]:
    """Open connections at a steady rate."""
    clients: list[Client] = []
    begin_s = time.perf_counter()
    for index, request in enumerate(requests):
        wait_s = begin_s + index / per_second - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        clients.append(await connect(port, request, **options))
    return clients


class Probe:
    """Asks ``/health`` all the time and notes how long each answer takes, in a process of its own: what the clients
    here do must not be taken for the server's. Use as an async context manager.

    Args:
        port: Of the server.
        interval_s: Between two questions.
    """

    def __init__(self, port: int, interval_s: float = 0.1) -> None:
        self._command = [sys.executable, str(HERE / "probe.py"), str(port), str(interval_s)]
        self.latencies_s: list[float] = []
        self.num_failed = 0

    async def __aenter__(self) -> Probe:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        out, _ = await self._process.communicate(b"")  # its input ends: so does it
        found = json.loads(out)
        self.latencies_s, self.num_failed = found["latencies_s"], found["num_failed"]


@dataclass(frozen=True)
class Lag:
    """How late the server's event loop was, by its own histogram."""

    buckets: dict[float, float]
    """Upper bound to how many times it was late by no more."""

    def since(self, before: Lag) -> Lag:
        """What has come since then."""
        return Lag({bound: count - before.buckets.get(bound, 0.0) for bound, count in self.buckets.items()})

    def quantile(self, share: float) -> float:
        """Upper bound of the bucket in which it lies; the largest of all for 1.0. 0.0 of nothing."""
        total = max(self.buckets.values(), default=0.0)
        reached = [bound for bound, count in self.buckets.items() if total and count >= share * total]
        return min(reached, default=0.0)


def quantile(values: Iterable[float], share: float) -> float:
    """Nearest rank; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def run_loop(work: Any) -> Any:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)

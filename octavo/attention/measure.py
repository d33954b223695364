"""What each attention backend says about a model on this machine, and how fast one layer's attention is.

For ``octavo attention``. Times are of ``attend`` alone, one layer, keys in memory rather than in caches: decode steps
that can be recorded are replayed from a CUDA graph, as the engine does. Knows no model and no request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend, AttentionSpec, is_capturable
from octavo.attention.registry import BACKENDS, choose_backend, reason_against
from octavo.batch import AttentionMetadata, StepShape
from octavo.errors import ConfigError

_COLD_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Keys and values in turn before the first are used again: several times the largest cache of a device."""
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """A step of equal requests."""

    batch: int
    queries: int
    context: int
    """Tokens of each request, the queries included."""

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        past = self.context - self.queries
        tokens = f"{self.context}" if self.queries == 1 or not past else f"{self.queries} after {past}"
        return f"{kind} {self.batch} x {tokens}"


CASES = {
    "cuda": (
        Case(1, 1, 4096), Case(64, 1, 2048), Case(256, 1, 800), Case(8, 2048, 2048), Case(1, 8192, 8192),
        Case(1, 2048, 10240),
    ),
    "cpu": (Case(1, 1, 512), Case(8, 1, 512), Case(1, 128, 128), Case(1, 64, 320)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Time:
    """Of one case with one backend."""

    milliseconds: float
    terabytes_per_s: float
    """Keys and values, each read once."""
    teraflops: float
    """Four operations per element of the head for each pair of a query and a key that it sees."""


def survey(spec: AttentionSpec, device_type: str) -> tuple[str, dict[str, str]]:
    """What ``auto`` would take and why, and for each backend the reason against it, empty when it can be used."""
    reasons: dict[str, str] = {}
    for name in BACKENDS.names():
        try:
            reasons[name] = reason_against(BACKENDS.load(name), spec, device_type) or ""
        except ConfigError as error:
            reasons[name] = f"it cannot be imported ({error.__cause__ or error.message})"
    try:
        backend, why = choose_backend("auto", spec, device_type)
    except ConfigError as error:
        return error.message, reasons
    return f"{backend.name}: {why}", reasons


def measure(name: str, spec: AttentionSpec, case: Case, device_type: str) -> Time:
    """Time one layer; the first calls, which compile, are not counted."""
    backend: AttentionBackend = BACKENDS.load(name)(spec)
    seconds = _time(backend, spec, case, torch.device(device_type))
    size = case.batch * case.context * 2 * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize
    seen = case.queries * (case.context - case.queries) + case.queries * (case.queries + 1) // 2
    if spec.sliding_window is not None:
        past = range(case.context - case.queries + 1, case.context + 1)
        seen = sum(min(length, spec.sliding_window) for length in past)
    flops = 4 * spec.num_heads * spec.head_dim * case.batch * seen
    return Time(1e3 * seconds, size / seconds / 1e12, flops / seconds / 1e12)


def _time(backend: AttentionBackend, spec: AttentionSpec, case: Case, device: torch.device) -> float:
    """Seconds of one ``attend``."""
    pages = -(-case.context // spec.block_size)
    shape = backend.kv_shape(case.batch * pages + 1)
    element = spec.kv_dtype.itemsize
    num_layers = max(1, -(-_COLD_BYTES[device.type] // (torch.Size(shape).numel() * element)))
    generator = torch.Generator(device).manual_seed(0)
    caches = [torch.randn(shape, generator=generator, device=device, dtype=spec.kv_dtype) for _ in range(num_layers)]
    order = torch.randperm(case.batch * pages, generator=generator, device=device) + 1
    table = order.view(case.batch, pages).int()
    tokens = case.batch * case.queries
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, generator=generator, device=device, dtype=spec.dtype)
    k, v = (q[:, : spec.num_kv_heads].contiguous() for _ in range(2))
    out = torch.empty_like(q)
    meta = _plan(backend, spec, case, table)
    sinks = {"sinks": torch.zeros(spec.num_heads, device=device)} if spec.has_sinks else {}

    def layers() -> None:
        for cache in caches:
            backend.attend(q, k, v, cache, meta, out, **sinks)

    with torch.inference_mode():
        backend.attend(q, k, v, caches[0], meta, out, **sinks)
        if device.type == "cpu":
            return _host_seconds(layers) / num_layers
        call = _recorded(layers) if case.queries == 1 and is_capturable(backend) else layers
        return _device_seconds(call) / num_layers


def _plan(backend: AttentionBackend, spec: AttentionSpec, case: Case, table: Tensor) -> AttentionMetadata:
    device = table.device
    step = StepShape(
        num_tokens=case.batch * case.queries, num_reqs=case.batch, max_query_len=case.queries,
        max_seq_len=case.context, query_lens=(case.queries,) * case.batch, seq_lens=(case.context,) * case.batch,
    )  # fmt: skip
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.queries
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    positions = torch.arange(case.context - case.queries, case.context, device=device)
    slots = table[:, positions // spec.block_size].long() * spec.block_size + positions % spec.block_size
    return backend.plan(step, starts, lens, table, slots.flatten())


def _host_seconds(call: Callable[[], None]) -> float:
    seconds: list[float] = []
    for _ in range(_REPEATS):
        begin_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin_s)
    return statistics.median(seconds)


def _recorded(call: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _device_seconds(call: Callable[[], None]) -> float:
    call()
    seconds: list[float] = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)

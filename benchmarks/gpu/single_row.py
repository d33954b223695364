"""One token through all layers of a model: what a layer takes, and which sizes of its four products are fastest.

    python benchmarks/gpu/single_row.py                  # as the engine does it, beside a launch for each operation
    python benchmarks/gpu/single_row.py --tune           # other sizes, one product after the other

Shapes of Qwen3-0.6B (m1) and Llama-3.1-8B (m2) in bfloat16 with random weights, recorded as one CUDA graph: norms,
products, attention over ``--context`` tokens; without embedding, head and draw. Prints microseconds a layer and the
GB/s at which weights are read. Made ``one_row_plan`` in ``octavo/kernels/skinny.py``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec, HeadPreparation
from octavo.attention.triton import TritonBackend
from octavo.batch import StepShape
from octavo.kernels.activation import silu_and_mul
from octavo.kernels.gpu.one_row import one_row
from octavo.kernels.norm import add_rms_norm
from octavo.kernels.rope import norm_rotate_write
from octavo.kernels.skinny import OneRowPlan, one_row_plan

PAGE = 64
MAX_TOKENS = 8192
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    has_head_norms: bool

    def product(self, name: str) -> tuple[int, int]:
        """Outputs and columns."""
        qkv, mixed = (self.heads + 2 * self.kv_heads) * self.head_dim, self.heads * self.head_dim
        return {
            "qkv": (qkv, self.hidden), "out": (self.hidden, mixed), "gate_up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }[name]  # fmt: skip


SHAPES = {"m1": Shape(28, 1024, 16, 8, 128, 3072, True), "m2": Shape(32, 4096, 32, 8, 128, 14336, False)}
PRODUCTS = ("gate_up", "qkv", "out", "down")
Plans = Mapping[str, OneRowPlan]


class Model:
    """Random weights and caches of all layers, and the step."""

    def __init__(self, shape: Shape, context: int) -> None:
        self.shape = shape

        def weight(name: str) -> Tensor:
            outputs, columns = shape.product(name)
            rows = outputs * (2 if name == "gate_up" else 1)
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

        def ones(size: int) -> Tensor:
            return torch.ones(size, device="cuda", dtype=torch.bfloat16)

        blocks = -(-MAX_TOKENS // PAGE) + 1
        kv = (blocks, 2, shape.kv_heads, PAGE, shape.head_dim)
        self.layers = [{name: weight(name) for name in PRODUCTS} for _ in range(shape.layers)]
        self.caches = [torch.randn(kv, device="cuda", dtype=torch.bfloat16) for _ in range(shape.layers)]
        self.norm = ones(shape.hidden)
        head_norms = (ones(shape.head_dim), ones(shape.head_dim), EPS) if shape.has_head_norms else None
        angles = torch.rand(MAX_TOKENS, shape.head_dim // 2, device="cuda")
        self.x = torch.randn(1, shape.hidden, device="cuda", dtype=torch.bfloat16)
        spec = AttentionSpec(
            shape.heads, shape.kv_heads, shape.head_dim, PAGE, torch.bfloat16, torch.bfloat16, shape.head_dim**-0.5
        )
        self.backend = TritonBackend(spec)
        last = context - 1
        self.heads = HeadPreparation(
            head_norms, torch.polar(torch.ones_like(angles), angles), torch.tensor([last], device="cuda")
        )
        self.table = torch.arange(1, blocks, dtype=torch.int32, device="cuda")[None]
        self.slots = torch.tensor([(1 + last // PAGE) * PAGE + last % PAGE], device="cuda")
        self.starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        self.lens = torch.tensor([context], dtype=torch.int32, device="cuda")
        self.step = StepShape(1, 1, 1, context, (1,), (context,))
        torch.cuda.synchronize()

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(2 * weight.numel() for layer in self.layers for weight in layer.values())

    def fused(self, plans: Plans) -> None:
        """As the engine does it: five launches a layer."""
        meta = self.backend.plan(self.step, self.starts, self.lens, self.table, self.slots)
        residual, norm, shape = self.x.clone(), (self.norm, EPS), self.shape
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = one_row(residual, layer["qkv"], None, plans["qkv"], norm=norm)
            mixed = qkv.new_empty(1, shape.heads, shape.head_dim)
            self.backend.attend_projection(qkv, self.heads, cache, meta, mixed)
            one_row(mixed.flatten(1), layer["out"], None, plans["out"], residual=residual)
            inner = one_row(residual, layer["gate_up"], None, plans["gate_up"], norm=norm, act="silu")
            one_row(inner, layer["down"], None, plans["down"], residual=residual)

    def apart(self, plans: Plans) -> None:
        """A launch for each operation, two for attention."""
        meta = self.backend.plan(self.step, self.starts, self.lens, self.table, self.slots)
        shape, heads = self.shape, self.heads
        residual, delta = self.x.clone(), torch.zeros_like(self.x)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = one_row(add_rms_norm(residual, delta, self.norm, EPS), layer["qkv"], None, plans["qkv"])
            views = cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)
            norm_rotate_write(
                qkv, shape.heads, shape.kv_heads, heads.norms, heads.table, heads.positions, *views, self.slots
            )
            q = qkv.view(1, -1, shape.head_dim)[:, : shape.heads]
            mixed = torch.empty_like(q)
            self.backend.attend(q, q, q, cache, meta, mixed)
            delta = one_row(mixed.flatten(1), layer["out"], None, plans["out"])
            x = add_rms_norm(residual, delta, self.norm, EPS)
            delta = one_row(
                silu_and_mul(one_row(x, layer["gate_up"], None, plans["gate_up"])), layer["down"], None, plans["down"]
            )


def time_us(run: Callable[[], None]) -> float:
    """Median of a replay."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
        side.synchronize()
        graph.capture_begin()
        run()
        graph.capture_end()
    times: list[float] = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / 4)
    return statistics.median(times)


def chosen(shape: Shape, *, fused: bool) -> dict[str, OneRowPlan]:
    """What the engine takes."""
    plans: dict[str, OneRowPlan] = {}
    for name in PRODUCTS:
        outputs, columns = shape.product(name)
        if not fused and name == "gate_up":
            outputs *= 2
        plan = one_row_plan(
            outputs, columns, is_gated=fused and name == "gate_up", is_normed=fused and name in ("gate_up", "qkv")
        )
        assert plan is not None
        plans[name] = plan
    return plans


def candidates(shape: Shape, name: str) -> Iterator[OneRowPlan]:
    """Sizes that fit into registers and give every processor something."""
    outputs, columns = shape.product(name)
    gates, norm = (2 if name == "gate_up" else 1), (2 if name in ("gate_up", "qkv") else 0)
    for rows, block, warps in itertools.product((2, 4, 8, 16), (256, 512, 1024), (2, 4, 8)):
        if columns % block or outputs % rows or not 100 <= outputs // rows <= 8192:
            continue
        for held in sorted({1, 2, 3, 4, columns // block}):
            registers = rows * block * (held * (gates + norm + 1) / 2 + gates) / (32 * warps)
            if held <= min(8, columns // block) and 24 <= registers <= 200:
                yield OneRowPlan(rows, block, held, warps)


def compile_ahead(name: str) -> None:
    """Fill Triton's cache on disk, several at a time."""
    shape, workers = SHAPES[name], max(1, (os.cpu_count() or 4) - 2)
    jobs = [(product, plan) for product in PRODUCTS for plan in candidates(shape, product)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_compile, [(name, jobs[each::workers]) for each in range(workers)]))


def _compile(part: tuple[str, list[tuple[str, OneRowPlan]]]) -> None:
    shape = SHAPES[part[0]]
    for product, plan in part[1]:
        outputs, columns = shape.product(product)
        act = "silu" if product == "gate_up" else None
        weight = torch.zeros(outputs * (2 if act else 1), columns, device="cuda", dtype=torch.bfloat16)
        x = weight[:1]
        if product in ("gate_up", "qkv"):
            one_row(x, weight, None, plan, norm=(x[0], EPS), act=act)
        else:
            one_row(x, weight, None, plan, residual=torch.zeros(1, outputs, device="cuda", dtype=torch.bfloat16))


def tune(name: str, model: Model, plans: dict[str, OneRowPlan]) -> None:
    """The best sizes of one product after the other."""
    best = time_us(lambda: model.fused(plans))
    for product in PRODUCTS:
        found = sorted(
            (time_us(lambda trial={**plans, product: plan}: model.fused(trial)), plan)
            for plan in candidates(model.shape, product)
        )
        for took, plan in found[:5]:
            print(f"{name} {product:>8} {took / model.shape.layers:7.2f} us a layer with {tuple(plan)}", flush=True)
        if found[0][0] < best:
            best, plans[product] = found[0]
    print(f"{name} {best / model.shape.layers:16.2f} us a layer with { ({k: tuple(v) for k, v in plans.items()}) }")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="m1,m2")
    parser.add_argument("--context", type=int, action="append", help="tokens of the request; may be repeated")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"--models: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    for name in names:
        shape = SHAPES[name]
        for context in options.context or (128, 256, 1024, 4096):
            model = Model(shape, context)
            for label, run, fused in (("in parts", model.apart, False), ("fused", model.fused, True)):
                plans = chosen(shape, fused=fused)
                took = time_us(lambda run=run, plans=plans: run(plans))
                rate = model.num_bytes / took / 1e3
                print(f"{name} {context:>5} {label:>9}: {took / shape.layers:7.2f} us a layer, {rate:5.0f} GB/s")
        if options.tune:
            compile_ahead(name)
            tune(name, Model(shape, 256), chosen(shape, fused=True))


if __name__ == "__main__":
    main()

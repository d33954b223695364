"""Products of 9 to 256 rows: cuBLAS beside the plans of ``octavo/kernels/skinny.py``, each behind its real neighbour.

    python benchmarks/gpu/rows.py [--models m1,m2] [--rows 16,24,...] [--best 3] [--write [PATH]]

A chain of copies of one weight, larger than the L2 cache together, is recorded as a graph: the kernel that comes before
the product in a layer, the product, and so on. Printed are microseconds of a pair, and of the product as what is left
when the neighbour's own time is taken off; GB/s of weights and TFLOP/s belong to that. gate_up is the product and its
activation, in one launch or in two. Every plan's result is compared with torch's. At the end of each number of
rows stands a whole layer but for attention, without plans and with the winners. ``--write`` puts plans into the table
that ``choose_plan`` reads: the fewest different ones within 3 % of the winners, since each is compiled at a start.

Plans are compiled by several processes first. ``--device cpu`` tries the script on tiny sizes, by Triton's interpreter
(``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.runtime.errors import TritonError

import octavo.kernels.skinny
from octavo.kernels.activation import silu_and_mul
from octavo.kernels.gpu.linear import gated_linear, linear
from octavo.kernels.norm import add_rms_norm, rms_norm
from octavo.kernels.skinny import TABLE, SkinnyPlan, candidates, choose_plan, estimate, format_plans

SHAPES = {"m1": (1024, 4096, 2048, 3072), "m2": (4096, 6144, 4096, 14336)}
"""Hidden size, rows of qkv, columns of the output projection, feed-forward size."""
TINY = {"tiny": (256, 192, 256, 264)}
ROWS = [16, 24, 32, 48, 64, 96, 128, 192, 256]
EPS = 1e-6
CACHE_BYTES = 160 * 2**20
"""Weights of a chain are at least so large: three times the L2 cache."""


@dataclass(frozen=True)
class Product:
    """One of a layer's four."""

    model: str
    name: str
    outputs: int
    columns: int
    is_gated: bool = False

    @property
    def weight_rows(self) -> int:
        return self.outputs * (2 if self.is_gated else 1)


def products(model: str, shape: tuple[int, int, int, int]) -> list[Product]:
    hidden, qkv, mixed, inner = shape
    return [
        Product(model, "qkv", qkv, hidden),
        Product(model, "o", hidden, mixed),
        Product(model, "gate_up", inner, hidden, is_gated=True),
        Product(model, "down", hidden, inner),
    ]


def multiply(x: torch.Tensor, weight: torch.Tensor, plan: SkinnyPlan | None, is_gated: bool) -> torch.Tensor:
    if plan is None and is_gated:
        apart = choose_plan(len(x), *weight.shape)
        return silu_and_mul(F.linear(x, weight) if apart is None else linear(x, weight, None, apart))
    if plan is None:
        return F.linear(x, weight)
    if is_gated:
        return gated_linear(x, weight, None, plan, act="silu")
    return linear(x, weight, None, plan)


class Chain:
    """Copies of a product with its neighbour before it, for so many rows."""

    def __init__(self, product: Product, rows: int, device: str, dtype: torch.dtype) -> None:
        self.product, self.rows = product, rows
        outputs, columns = product.weight_rows, product.columns
        copies = 2 if device == "cpu" else max(2, min(40, -(-CACHE_BYTES // (2 * outputs * columns))))
        self.weights = [
            torch.randn(outputs, columns, device=device).mul_(columns**-0.5).to(dtype) for _ in range(copies)
        ]
        self._wide = torch.randn(rows, 2 * columns, device=device).to(dtype)
        self._residual = torch.randn(rows, columns, device=device).to(dtype)
        self._delta = torch.zeros_like(self._residual)
        self._norm = torch.ones(columns, device=device, dtype=dtype)

    def neighbour(self) -> torch.Tensor:
        """x, made by what comes before: a norm, an activation, or for attention a kernel that writes as much."""
        if self.product.name == "down":
            return silu_and_mul(self._wide)
        if self.product.name == "o":
            return rms_norm(self._residual, self._norm, EPS)
        return add_rms_norm(self._residual, self._delta, self._norm, EPS)

    def run(self, plan: SkinnyPlan | None) -> None:
        for weight in self.weights:
            multiply(self.neighbour(), weight, plan, self.product.is_gated)

    def run_neighbours(self) -> None:
        for _ in self.weights:
            self.neighbour()

    def check(self, plan: SkinnyPlan | None) -> None:
        """The plan's result is torch's, twice."""
        x = self.neighbour()
        expected = multiply(x, self.weights[0], None, self.product.is_gated).float()
        for _ in range(2):
            result = multiply(x, self.weights[0], plan, self.product.is_gated).float()
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def time_us(run: Callable[[], None], device: str) -> float:
    """Of one replay, the median of several measurements."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    run()
    graph.capture_end()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / 3)
    return statistics.median(times)


def label(plan: SkinnyPlan | None, product: Product) -> str:
    if plan is None:
        return "product and activation" if product.is_gated else "cuBLAS"
    marks = (" swap" if plan.is_swapped else "") + (" tma" if plan.uses_tma else "") + (
        " prefetch" if plan.prefetches else ""
    )  # fmt: skip
    sizes = f"{plan.block_rows}x{plan.block_outputs}x{plan.block_columns}"
    return f"{sizes} /{plan.split} w{plan.num_warps} s{plan.stages}{marks}"


def plans_of(product: Product, rows: int, best: int) -> list[SkinnyPlan]:
    """The most promising ones of each kind, what is chosen now, and variants of the best."""
    plans = candidates(rows, product.outputs, product.columns, is_gated=product.is_gated)
    at_once = [plan for plan in plans if plan.stages == 1][:2]
    staged = [plan for plan in plans if plan.stages > 1][:best]
    chosen = choose_plan(rows, product.outputs, product.columns, is_gated=product.is_gated)
    extra = [chosen] if chosen is not None else []
    for plan in staged[:1]:
        wide = plan.block_outputs * (2 if product.is_gated else 1)
        if rows <= 128 and plan.block_columns == 128 and plan.block_rows * wide >= 64 * 64:
            extra.append(plan._replace(num_warps=8))
    if rows <= 32 and staged and staged[0].is_swapped and product.outputs % staged[0].block_outputs == 0:
        extra.append(staged[0]._replace(uses_tma=False))
    return list(dict.fromkeys(at_once + staged + extra))


def steps_of(plan: SkinnyPlan, columns: int) -> int:
    """Of a program that has all its weights at once; the compiled kernel depends on it."""
    return -(-columns // (plan.split * plan.block_columns)) if plan.stages == 1 else 1


Job = tuple[SkinnyPlan, bool, str, int]
"""Plan, whether gated, dtype, steps."""


def compile_plan(job: Job) -> None:
    """Fill the kernel cache; in a process of its own. What fails is told where it is measured."""
    plan, is_gated, dtype, steps = job
    outputs, columns = plan.block_outputs, plan.split * plan.block_columns * steps
    x = torch.zeros(plan.block_rows, columns, device="cuda", dtype=getattr(torch, dtype))
    weight = torch.zeros(outputs * (2 if is_gated else 1), columns, device="cuda", dtype=x.dtype)
    with contextlib.suppress(RuntimeError, TritonError):
        multiply(x, weight, plan, is_gated)


def compile_all(jobs: list[Job]) -> None:
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, max(1, multiprocessing.cpu_count() - 2)), mp_context=context) as pool:
        list(pool.map(compile_plan, jobs))
    print(f"compiled {len(jobs)} variants in {time.monotonic() - began:.1f} s", flush=True)


Times = dict[SkinnyPlan | None, float]
"""Microseconds of a pair by plan; None is cuBLAS."""
Measured = dict[Product, dict[int, Times]]
Winners = dict[Product, dict[int, SkinnyPlan | None]]
NEARLY = 1.03
"""A plan that takes so many times the winner's time is as good."""


def fewest(measured: Measured) -> Winners:
    """A plan for each product and number of rows, nearly the fastest, so that few kernels are compiled: again and again
    the one that serves most of those that have none yet. cuBLAS where it wins."""
    chosen: Winners = {product: {} for product in measured}
    good: dict[tuple[Product, int], set[tuple[SkinnyPlan, bool]]] = {}
    for product, by_rows in measured.items():
        for rows, times in by_rows.items():
            best = min(times.values())
            if times[None] == best:
                chosen[product][rows] = None
                continue
            near = {plan for plan, us in times.items() if plan is not None and us <= min(NEARLY * best, times[None])}
            good[product, rows] = {(plan, product.is_gated) for plan in near}
    while good:
        counts = Counter(key for keys in good.values() for key in keys)
        (plan, is_gated), _ = counts.most_common(1)[0]
        for product, rows in [cell for cell, keys in good.items() if (plan, is_gated) in keys]:
            chosen[product][rows] = plan
            del good[product, rows]
    return {product: dict(sorted(plans.items())) for product, plans in chosen.items()}


def measure(product: Product, rows: int, options: argparse.Namespace) -> Times:
    """Print a row for each plan, fastest first."""
    chain = Chain(product, rows, options.device, options.dtype)
    chain.run_neighbours()
    count = len(chain.weights)
    alone = time_us(chain.run_neighbours, options.device) / count
    took: Times = {}
    for plan in (None, *plans_of(product, rows, options.best)):
        try:
            chain.check(plan)
        except (
            AssertionError,
            RuntimeError,
            TritonError,
        ) as error:  # one plan's trouble must not cost the other figures
            print(
                f"{product.model} {product.name:>7} {rows:4} rows: FAILED {label(plan, product)}: {error}", flush=True
            )
            continue
        took[plan] = time_us(lambda plan=plan: chain.run(plan), options.device) / count
    flops = 2 * rows * product.weight_rows * product.columns
    size = 2 * product.weight_rows * product.columns
    winner = min(took, key=lambda plan: took[plan])
    for plan, pair in sorted(took.items(), key=lambda item: item[1]):
        us = max(pair - alone, 1e-3)
        expected = ""
        if plan is not None:
            guess = estimate(plan, rows, product.outputs, product.columns, is_gated=product.is_gated)
            expected = f" expected {guess:6.1f}"
        print(
            f"{product.model} {product.name:>7} {rows:4} rows: {pair:8.2f} us a pair, {us:8.2f} us, "
            f"{size / us / 1e3:5.0f} GB/s, {flops / us / 1e6:4.0f} TFLOP/s  {label(plan, product)}{expected}"
            f"{'  <' if plan == winner else ''}",
            flush=True,
        )
    return took


def layer_us(model: list[Product], rows: int, winners: Winners | None, options: argparse.Namespace) -> float:
    """A layer without attention."""
    chains = [Chain(product, rows, options.device, options.dtype) for product in model]
    count = min(len(chain.weights) for chain in chains)

    def run() -> None:
        for index in range(count):
            x = None
            for chain in chains:
                # What the gated product makes goes into down as it is.
                x = x if chain.product.name == "down" and x is not None else chain.neighbour()
                plan = None if winners is None else winners[chain.product][rows]
                x = multiply(x, chain.weights[index], plan, chain.product.is_gated)

    run()
    return time_us(run, options.device) / count


def measure_all(models: list[list[Product]], options: argparse.Namespace, deadline: float) -> Measured:
    measured: Measured = {product: {} for model in models for product in model}
    for model in models:
        for rows in options.rows:
            for product in model:
                if time.monotonic() > deadline:
                    print(f"{product.model} {product.name} {rows} rows: skipped, out of time", flush=True)
                    continue
                measured[product][rows] = measure(product, rows, options)
            if time.monotonic() < deadline:
                winners: Winners = {
                    product: {rows: min(measured[product][rows], key=measured[product][rows].__getitem__)}
                    for product in model
                }
                before, after = (layer_us(model, rows, which, options) for which in (None, winners))
                name = model[0].model
                print(
                    f"{name}   layer {rows:4} rows: {before:8.2f} us without plans, {after:8.2f} with the winners",
                    flush=True,
                )
    return measured


def write(winners: Winners, path: Path) -> None:
    """Replace the table's entries of these products."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"products": []}
    keys = {(product.outputs, product.columns, product.is_gated) for product in winners}
    kept = [e for e in table["products"] if (e["outputs"], e["columns"], e["is_gated"]) not in keys]
    made = [format_plans(p.outputs, p.columns, p.is_gated, plans) for p, plans in winners.items()]
    lines = ",\n".join(json.dumps(entry) for entry in kept + made)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    note = json.dumps(f"{device}, torch {torch.__version__}, Triton {triton.__version__}")
    text = f'{{"measured": {note},\n"products": [\n{lines}\n]}}\n'
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{text}wrote {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default="m1,m2")
    parser.add_argument("--rows", type=lambda text: [int(x) for x in text.split(",")], default=ROWS)
    parser.add_argument("--best", type=int, default=3, help="candidates by estimate")
    parser.add_argument("--time-limit", type=float, default=95, help="seconds; what does not fit is skipped")
    table = Path(octavo.kernels.skinny.__file__).parent / TABLE
    parser.add_argument(
        "--write", type=Path, nargs="?", const=table, metavar="PATH", help=f"the table; {TABLE} if alone"
    )
    options = parser.parse_args()
    began = time.monotonic()
    options.dtype = torch.float16 if options.device == "cpu" else torch.bfloat16
    shapes = TINY if options.device == "cpu" else {name: SHAPES[name] for name in options.models.split(",")}
    models = [products(name, shape) for name, shape in shapes.items()]
    if options.device == "cuda":
        dtype = str(options.dtype).removeprefix("torch.")
        jobs = [
            (plan, product.is_gated, dtype, steps_of(plan, product.columns))
            for model in models
            for product in model
            for rows in options.rows
            for plan in plans_of(product, rows, options.best)
        ]
        compile_all(list(dict.fromkeys(jobs)))
    # One stream for all, since cuBLAS keeps memory for each, and graphs are not recorded in the default one.
    with torch.cuda.stream(torch.cuda.Stream()) if options.device == "cuda" else contextlib.nullcontext():
        measured = measure_all(models, options, began + options.time_limit)
    if options.write:
        write(fewest({product: times for product, times in measured.items() if times}), options.write)


if __name__ == "__main__":
    main()

"""Mixtures of experts on a GPU: our kernels beside ``torch._grouped_mm``, and the table of tile sizes.

    python benchmarks/gpu/moe.py                                   # the shipped plans, batch 1 to 8192
    python benchmarks/gpu/moe.py --shape 32,4,2880,2880 --tokens 1,64,256
    python benchmarks/gpu/moe.py --tune --write --seconds 8        # measure sizes, a time for each number of tokens
    python benchmarks/gpu/moe.py --output results.jsonl

One layer of the given shape (default: Qwen3-30B-A3B) in bfloat16 with random weights and a random choice of experts, in
a CUDA graph over as many copies of the weights as exceed the cache, so that every launch reads them from memory. A row
holds microseconds; GB/s of what has to be read and written once (weights of the experts that were hit, activations);
TFLOP/s of real rows, padding not counted; and the share of the roofline: the larger of bytes over the device's measured
copy bandwidth and operations over its measured matrix rate, over the time. Routing and sorting are timed by themselves.
``--write`` puts the sizes into octavo/kernels/moe/tables/, where the engine looks for those of its device.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.cli.bench_ceilings import measure_ceilings
from octavo.cli.bench_limits import Ceilings
from octavo.kernels.gpu import moe
from octavo.kernels.moe.experts import Activation, ExpertTensors, experts_by_plan, experts_ref
from octavo.kernels.moe.plans import (
    GROUPED_MM,
    MoePlan,
    MoeShape,
    PairSizes,
    TileSizes,
    choose_plan,
    default_plan,
    format_plans,
    measured,
    table_name,
)
from octavo.kernels.moe.routing import Routing

QWEN3_30B_A3B = MoeShape(128, 8, 2048, 768)
TABLES = Path(__file__).parents[2] / "octavo" / "kernels" / "moe" / "tables"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_CACHE_BYTES = 128 << 20
"""More than the last cache of any GPU that this is for."""
_REPEATS = 20


@dataclass(frozen=True)
class Layer:
    """Weights of one layer and inputs for it."""

    shape: MoeShape
    copies: list[ExpertTensors]
    """The same shape over and over, so that none is in the cache when its turn comes."""
    x: Tensor
    weights: Tensor
    experts: Tensor

    @property
    def num_bytes(self) -> int:
        """What has to move once: weights of the experts that were hit, the input, the output."""
        hit = len(self.experts.unique())
        expert = 3 * self.shape.hidden_size * self.shape.inner_size
        return 2 * (hit * expert + 2 * self.x.numel())

    @property
    def num_operations(self) -> int:
        """Of the products, for real rows."""
        return 2 * self.experts.numel() * 3 * self.shape.hidden_size * self.shape.inner_size


def enough_copies(shape: MoeShape) -> int:
    """Of the weights, so that one token's experts in all of them exceed the cache, as far as memory allows."""
    expert_bytes = 2 * 3 * shape.hidden_size * shape.inner_size
    free = torch.cuda.mem_get_info()[0] // 2
    return max(1, min(-(-_CACHE_BYTES // (shape.top_k * expert_bytes)), free // (shape.num_experts * expert_bytes)))


def make_weights(shape: MoeShape, copies: int) -> list[ExpertTensors]:
    """Random weights of the layer, ``copies`` times."""
    count, _, size, inner = shape

    def normal(*dims: int, scale: float) -> Tensor:
        return torch.empty(dims, dtype=torch.bfloat16, device="cuda").normal_(0.0, scale)

    return [
        ExpertTensors(normal(count, 2 * inner, size, scale=size**-0.5), normal(count, size, inner, scale=inner**-0.5))
        for _ in range(copies)
    ]


def make_layer(shape: MoeShape, copies: list[ExpertTensors], tokens: int) -> Layer:
    """Inputs whose experts are drawn evenly; the same ones every time."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden_size, generator=generator, device="cuda").bfloat16()
    scores = torch.rand(tokens, shape.num_experts, generator=generator, device="cuda")
    weights, experts = scores.topk(shape.top_k, dim=-1)
    return Layer(shape, copies, x, (weights / weights.sum(-1, keepdim=True)).contiguous(), experts.int().contiguous())


def time_us(calls: list[Callable[[], Any]]) -> float:
    """Median microseconds of one call, all of them recorded in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(_REPEATS):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def time_plan(layer: Layer, plan: MoePlan) -> float:
    """Microseconds of the experts, sorting included, routing not."""
    return time_us([
        lambda tensors=tensors: experts_by_plan(
            layer.x, tensors, layer.weights, layer.experts, Activation(), plan
        )
        for tensors in layer.copies
    ])  # fmt: skip


def check(layer: Layer, plan: MoePlan) -> None:
    """The plan computes what it should, at this very shape. Some tokens suffice."""
    few = slice(0, min(len(layer.x), 8))
    tensors = layer.copies[0]
    got = experts_by_plan(layer.x, tensors, layer.weights, layer.experts, Activation(), plan)[few]
    expected = experts_ref(layer.x[few], tensors, layer.weights[few], layer.experts[few], Activation())
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)


def row_of(layer: Layer, name: str, microseconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What one measurement says."""
    seconds = microseconds * 1e-6
    limit_s = max(layer.num_bytes / ceilings.bytes_per_s, layer.num_operations / ceilings.flop_per_s)
    return {
        "shape": list(layer.shape), "tokens": len(layer.x), "name": name, "us": round(microseconds, 2),
        "GBps": round(layer.num_bytes / seconds / 1e9, 1), "TFLOPs": round(layer.num_operations / seconds / 1e12, 2),
        "limit_us": round(limit_s * 1e6, 2), "roofline_ratio": round(limit_s / seconds, 3),
    }  # fmt: skip


def candidates(shape: MoeShape, tokens: int) -> Iterator[MoePlan]:
    """Plans worth trying for so many tokens."""
    yield default_plan(shape, tokens)
    mean = tokens * shape.top_k / shape.num_experts
    if mean >= 16:
        yield GROUPED_MM
    if mean <= 1:
        for outputs, columns, down_outputs, down_columns, warps in itertools.product(
            (4, 8, 16), (256, 512, 1024), (8, 16, 32), (128, 256), (4, 8)
        ):
            yield MoePlan(pairs=PairSizes(outputs, columns, down_outputs, down_columns, warps))
    for rows in (16, 32, 64, 128):
        if mean / 8 <= rows <= 16 * max(1.0, mean):
            yield from _tiles(rows)


def _tiles(rows: int) -> Iterator[MoePlan]:
    for outputs, columns, group, warps, stages, is_swapped in itertools.product(
        (32, 64, 128), (64, 128), (1, 8), (4, 8), (3, 4, 5), (True, False)
    ):
        if is_swapped != (rows <= 32) or (group > 1 and rows < 64) or (warps == 8 and outputs * rows < 8192):
            continue
        sizes = TileSizes(rows, outputs, columns, group, warps, stages, is_swapped)
        yield MoePlan(gate_up=sizes, down=sizes)


def compile_ahead(shape: MoeShape, tokens: list[int], workers: int) -> None:
    """Fill Triton's cache on disk with the kernels of all candidates: compiling takes most of tuning's time, and one
    process does one at a time. What does not compile fails again, and is told of, when it is timed."""
    plans = list(dict.fromkeys(plan for number in tokens for plan in candidates(shape, number)))
    parts = [(shape, plans[each::workers]) for each in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_compile, parts))


def _compile(part: tuple[MoeShape, list[MoePlan]]) -> None:
    shape, plans = part
    layer = make_layer(shape, make_weights(shape, 1), 2)
    for plan in plans:
        with contextlib.suppress(Exception):
            experts_by_plan(layer.x, layer.copies[0], layer.weights, layer.experts, Activation(), plan)


def tune(layer: Layer, seconds: float) -> tuple[MoePlan, float]:
    """The best plan within the time: the best sizes for both products alike, then others for the second."""
    best, best_us = GROUPED_MM, float("inf")
    default, *others = dict.fromkeys(candidates(layer.shape, len(layer.x)))
    random.Random(0).shuffle(others)
    deadline_s = time.monotonic() + seconds * 0.7
    for plan in (default, *others):
        if time.monotonic() < deadline_s or plan == default:
            best, best_us = _better(layer, plan, best, best_us)
    deadline_s += seconds * 0.3
    if best.gate_up is not None:
        for other in _tiles(best.gate_up.rows):
            if time.monotonic() < deadline_s:
                best, best_us = _better(layer, MoePlan(gate_up=best.gate_up, down=other.down), best, best_us)
    check(layer, best)
    return best, best_us


def _better(layer: Layer, plan: MoePlan, best: MoePlan, best_us: float) -> tuple[MoePlan, float]:
    try:
        microseconds = time_plan(layer, plan)
    except Exception as error:  # too much shared memory, or too many registers: sizes for another device
        print(f"  {plan}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
        return best, best_us
    return (plan, microseconds) if microseconds < best_us else (best, best_us)


def main() -> None:
    """Measure, print a table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append", help="experts,top_k,hidden,inner; may be repeated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--tune", action="store_true", help="look for the best sizes")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --tune: time for each number of tokens")
    parser.add_argument("--write", action="store_true", help="with --tune: write the table of this device")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2), help="with --tune: compilers")
    parser.add_argument("--output", help="append rows as JSON lines")
    options = parser.parse_args()
    if options.write and not options.tune:
        parser.error("--write needs --tune")
    shapes = [MoeShape(*map(int, each.split(","))) for each in options.shape or []] or [QWEN3_30B_A3B]
    ceilings = Ceilings.from_row(measure_ceilings("cuda"))
    device = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    tables = dict(measured(device))
    numbers = [int(number) for number in options.tokens.split(",")]
    for shape in shapes:
        if options.tune:
            compile_ahead(shape, numbers, options.workers)
        copies = make_weights(shape, enough_copies(shape))
        chosen: dict[int, MoePlan] = {}
        for tokens in numbers:
            layer = make_layer(shape, copies, tokens)
            if options.tune:
                chosen[tokens], microseconds = tune(layer, options.seconds)
                print(f"{shape} {tokens}: {chosen[tokens]}", file=sys.stderr)
            else:
                plan = choose_plan(device, shape, tokens, 2)
                check(layer, plan)
                microseconds = time_plan(layer, plan)
            rows.append(row_of(layer, "octavo", microseconds, ceilings))
            rows.append(row_of(layer, "torch._grouped_mm", time_plan(layer, GROUPED_MM), ceilings))
            logits = torch.randn(tokens, shape.num_experts, device="cuda").bfloat16()
            rule = Routing(shape.top_k, is_normalised=True)
            for name, call in (
                ("route", lambda logits=logits, rule=rule: moe.route(logits, rule, None)),
                ("align", lambda layer=layer: moe.align(layer.experts, layer.shape.num_experts, 16)),
            ):
                rows.append({"shape": list(shape), "tokens": tokens, "name": name, "us": round(time_us([call] * 8), 2)})
            for row in rows[-4:]:
                print(json.dumps(row), flush=True)
        if chosen:
            tables[shape] = tuple(sorted(chosen.items()))
        del copies
    if options.output:
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"device": device, **row}) + "\n" for row in rows)
    if options.write:
        TABLES.mkdir(exist_ok=True)
        entries = [format_plans(shape, dict(plans)) for shape, plans in tables.items()]
        table = {"device": device, "torch": torch.__version__, "made_by": "benchmarks/gpu/moe.py", "shapes": entries}
        (TABLES / table_name(device)).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

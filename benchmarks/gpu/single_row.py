"""One token through the products of all layers, with several plans.

    python benchmarks/gpu/single_row.py

Prints microseconds a layer and GB/s of weights for the shapes of Qwen3-0.6B and Llama-3.1-8B in bfloat16; attention is
left out. Made the table in ``octavo/kernels/skinny.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.kernels.activation import silu_and_mul
from octavo.kernels.gpu.linear import linear
from octavo.kernels.norm import add_rms_norm
from octavo.kernels.skinny import SkinnyPlan, choose_plan


@dataclass
class Block:
    """Weights of one layer."""

    norms: tuple[torch.Tensor, torch.Tensor]
    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


SHAPES = {"m1": (28, 1024, 4096, 2048, 3072), "m2": (32, 4096, 6144, 4096, 14336)}
"""Layers, hidden size, rows of qkv, columns of the output projection, feed-forward size."""
EPS = 1e-6


def make(layers: int, hidden: int, qkv: int, mixed: int, inner: int) -> list[Block]:
    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

    def norm() -> torch.Tensor:
        return torch.ones(hidden, device="cuda", dtype=torch.bfloat16)

    return [
        Block(
            (norm(), norm()),
            weight(qkv, hidden),
            weight(hidden, mixed),
            weight(2 * inner, hidden),
            weight(hidden, inner),
        )  # fmt: skip
        for _ in range(layers)
    ]


def parts(blocks: list[Block], residual: torch.Tensor, choose: Callable[[torch.Tensor], SkinnyPlan]) -> None:
    """Every step a kernel of its own."""
    delta = torch.zeros_like(residual)
    for block in blocks:
        x = add_rms_norm(residual, delta, block.norms[0], EPS)
        mixed = linear(x, block.qkv, None, choose(block.qkv))[:, : block.out.shape[1]]
        x = add_rms_norm(residual, linear(mixed, block.out, None, choose(block.out)), block.norms[1], EPS)
        gate_up = linear(x, block.gate_up, None, choose(block.gate_up))
        delta = linear(silu_and_mul(gate_up), block.down, None, choose(block.down))


def time_us(run: Callable[[], None]) -> float:
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
        side.synchronize()
        graph.capture_begin()
        run()
        graph.capture_end()
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / 5)
    return statistics.median(times)


def planned(outputs: int, warps: int) -> Callable[[torch.Tensor], SkinnyPlan]:
    def choose(weight: torch.Tensor) -> SkinnyPlan:
        plan = choose_plan(1, *weight.shape)
        assert plan is not None
        return plan if outputs == 0 else plan._replace(block_outputs=outputs, num_warps=warps)

    return choose


def measure(name: str, shape: tuple[int, int, int, int, int]) -> None:
    blocks = make(*shape)
    residual = torch.randn(1, shape[1], device="cuda", dtype=torch.bfloat16)
    size = sum(2 * each.numel() for block in blocks for each in (block.qkv, block.out, block.gate_up, block.down))
    variants: dict[str, Callable[[], None]] = {}
    for outputs, warps in ((0, 0), (4, 4), (8, 4), (8, 8), (16, 4), (16, 8)):
        choose = planned(outputs, warps)
        label = f"outputs {outputs}, warps {warps}" if outputs else "as planned"
        variants[label] = lambda choose=choose: parts(blocks, residual, choose)
    for label, run in variants.items():
        took = time_us(run)
        print(f"{name} {label:>22}: {took / shape[0]:7.2f} us a layer, {size / took / 1e3:6.0f} GB/s", flush=True)


def main() -> None:
    for name, shape in SHAPES.items():
        measure(name, shape)


if __name__ == "__main__":
    main()

"""One token through the products of all layers: block by block from its parts, and fused, with several plans.

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
from octavo.kernels.gpu.linear import linear, multiply_row
from octavo.kernels.linear import Gate
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


def gated(blocks: list[Block], residual: torch.Tensor, choose: Callable[[torch.Tensor], SkinnyPlan]) -> None:
    """The activation is part of the down projection."""
    delta = torch.zeros_like(residual)
    for block in blocks:
        x = add_rms_norm(residual, delta, block.norms[0], EPS)
        mixed = linear(x, block.qkv, None, choose(block.qkv))[:, : block.out.shape[1]]
        x = add_rms_norm(residual, linear(mixed, block.out, None, choose(block.out)), block.norms[1], EPS)
        gate_up = linear(x, block.gate_up, None, choose(block.gate_up))
        delta = torch.empty_like(residual)
        multiply_row(gate_up, block.down, None, delta, choose(block.down), gate=int(Gate.SILU))


def fused(blocks: list[Block], residual: torch.Tensor, choose: Callable[[torch.Tensor], SkinnyPlan]) -> None:
    for block in blocks:
        qkv = residual.new_empty(1, len(block.qkv))
        multiply_row(residual, block.qkv, None, qkv, choose(block.qkv), norm=(block.norms[0], EPS))
        mixed = qkv[:, : block.out.shape[1]]
        multiply_row(mixed, block.out, None, residual, choose(block.out), adds=True)
        gate_up = residual.new_empty(1, len(block.gate_up))
        multiply_row(residual, block.gate_up, None, gate_up, choose(block.gate_up), norm=(block.norms[1], EPS))
        multiply_row(gate_up, block.down, None, residual, choose(block.down), gate=int(Gate.SILU), adds=True)


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


def planned(early: int | None, outputs: int, warps: int = 4) -> Callable[[torch.Tensor], SkinnyPlan]:
    def choose(weight: torch.Tensor) -> SkinnyPlan:
        plan = choose_plan(1, *weight.shape)
        assert plan is not None
        block = plan.block_outputs if outputs == 0 else outputs
        return plan._replace(early=plan.early if early is None else early, block_outputs=block, num_warps=warps)

    return choose


def measure(name: str, shape: tuple[int, int, int, int, int]) -> None:
    blocks = make(*shape)
    residual = torch.randn(1, shape[1], device="cuda", dtype=torch.bfloat16)
    size = sum(2 * each.numel() for block in blocks for each in (block.qkv, block.out, block.gate_up, block.down))
    variants: dict[str, Callable[[], None]] = {}
    for way in (parts, gated, fused):
        for early in (None, 0, 1, 2):
            for outputs in (4, 8, 16) if early is not None else (0,):
                for warps in (4, 8) if outputs == 16 else (4,):
                    label = f"{way.__name__}, early {early}, outputs {outputs or 'as planned'}, warps {warps}"
                    choose = planned(early, outputs, warps)
                    variants[label] = lambda way=way, choose=choose: way(blocks, residual, choose)
    for label, run in variants.items():
        took = time_us(run)
        print(f"{name} {label:>46}: {took / shape[0]:7.2f} us a layer, {size / took / 1e3:6.0f} GB/s", flush=True)


def main() -> None:
    for name, shape in SHAPES.items():
        measure(name, shape)


if __name__ == "__main__":
    main()

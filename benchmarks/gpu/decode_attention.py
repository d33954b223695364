"""Decode attention of one layer in a chain of layers, by settings: early launch, least part, tile, warps, stages.

    python benchmarks/gpu/decode_attention.py [--parts]

Microseconds a layer and GB/s of keys and values, from CUDA graphs over caches that are larger than the L2 cache.
``--parts`` tries how finely histories are cut instead, with the output projection behind each layer as in a model: it
waits for the slowest program, which a chain of attention alone hides.
"""

from __future__ import annotations

import statistics
import sys

import torch

from octavo.kernels.attention import decode
from octavo.kernels.attention.decode import decode_attention, make_work_list
from octavo.kernels.gpu import launch
from octavo.kernels.linear import linear

PAGE = 64
CASES = {
    "0.6B 1 x 256": (16, 8, 1, 256), "0.6B 1 x 4096": (16, 8, 1, 4096), "0.6B 48 x 1200": (16, 8, 48, 1200),
    "0.6B 256 x 800": (16, 8, 256, 800), "8B 1 x 256": (32, 8, 1, 256), "8B 256 x 768": (32, 8, 256, 768),
}  # fmt: skip
"""Query heads, KV heads, requests, tokens."""
PART_CASES = {
    "0.6B 48 x 600": (16, 8, 48, 600), "0.6B 100 x 700": (16, 8, 100, 700), "0.6B 200 x 512": (16, 8, 200, 512),
    "0.6B 256 x 384": (16, 8, 256, 384), "0.6B 256 x 1000": (16, 8, 256, 1000), "8B 256 x 600": (32, 8, 256, 600),
    "8B 256 x 1000": (32, 8, 256, 1000),
}  # fmt: skip


class Chain:
    """Layers one after the other."""

    def __init__(
        self, heads: int, kv_heads: int, reqs: int, context: int, *, is_mixed: bool = False, hidden: int = 0
    ) -> None:
        """``is_mixed``: lengths from a quarter to all of ``context``. ``hidden``: size of the projection behind."""
        per_layer = reqs * -(-context // PAGE) * 2 * kv_heads * PAGE * 128 * 2
        self.num_layers = max(4, min(64, (256 << 20) // per_layer + 1))
        self.bytes = reqs * context * 2 * kv_heads * 128 * 2
        pages = reqs * -(-context // PAGE)
        self.caches = [
            torch.randn(pages, 2, kv_heads, PAGE, 128, device="cuda").bfloat16() for _ in range(self.num_layers)
        ]
        self.table = torch.randperm(pages, device="cuda").int().view(reqs, -1)
        self.start = torch.arange(reqs + 1, dtype=torch.int32, device="cuda")
        self.lens = torch.full((reqs,), context, dtype=torch.int32, device="cuda")
        self.q = torch.randn(reqs, heads, 128, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)
        self.kv_heads = kv_heads
        if is_mixed:
            draw = torch.Generator(device="cuda").manual_seed(1)
            self.lens = torch.randint(context // 4, context + 1, (reqs,), device="cuda", generator=draw).int()
            self.bytes = int(self.lens.sum()) * 2 * kv_heads * 128 * 2
        self.out_proj = torch.randn(hidden, heads * 128, device="cuda").bfloat16() if hidden else None

    def time_us(self, tile: int) -> float:
        work = make_work_list(self.start, self.lens, self.kv_heads, 132, tile, None)

        def run() -> None:
            for cache in self.caches:
                decode_attention(self.q, cache, self.table, work, self.out, scale=0.088, window=None, softcap=None)
                if self.out_proj is not None:
                    linear(self.out.flatten(1), self.out_proj)

        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            run()
            side.synchronize()
            graph.capture_begin()
            run()
            graph.capture_end()
        times = []
        for _ in range(9):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / self.num_layers)
        return statistics.median(times)


def time_parts() -> None:
    """How many programs of a multiprocessor histories are cut for."""
    programs = decode.PROGRAMS_PER_SM
    for name, (heads, kv_heads, reqs, context) in PART_CASES.items():
        for is_mixed in (False, True):
            hidden = 1024 if heads == 16 else 4096
            chain = Chain(heads, kv_heads, reqs, context, is_mixed=is_mixed, hidden=hidden)
            for decode.PROGRAMS_PER_SM in (4, 8, 16):
                took = chain.time_us(decode.decode_tile(PAGE, reqs, 128))
                label = f"{name:>16}{' mixed' if is_mixed else '':6} for {decode.PROGRAMS_PER_SM:2} programs"
                print(f"{label}: {took:7.2f} us, {chain.bytes / took / 1e3:6.0f} GB/s", flush=True)
            del chain
    decode.PROGRAMS_PER_SM = programs


def main() -> None:
    if "--parts" in sys.argv[1:]:
        time_parts()
        return
    settings = decode._settings
    has_pdl, options = launch.has_pdl, launch.launch_options
    for name, (heads, kv_heads, reqs, context) in CASES.items():
        chain = Chain(heads, kv_heads, reqs, context)
        for pdl in (True, False):
            decode.has_pdl = has_pdl if pdl else lambda: False
            decode.launch_options = options if pdl else dict
            for part in (128, 512) if reqs == 1 else (128,):
                decode.MIN_PART_TOKENS = part
                for tile, warps, stages in ((32, 2, 5), (64, 4, 4)):
                    decode._settings = lambda *_, warps=warps, stages=stages: (warps, stages)
                    took = chain.time_us(tile)
                    print(f"{name:>16} early {pdl:d} part {part:3d} tile {tile} warps {warps} stages {stages}: "
                          f"{took:7.2f} us, {chain.bytes / took / 1e3:6.0f} GB/s", flush=True)  # fmt: skip
    decode._settings = settings


if __name__ == "__main__":
    main()

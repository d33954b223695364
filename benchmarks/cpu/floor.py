"""What this machine can do at most: bytes read and multiplications per second, measured with torch on two threads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

NUM_THREADS = 2


def best_of(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one to warm up."""
    call()
    seconds: list[float] = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    data = torch.ones(128 * 1024 * 1024)  # 512 MiB, far beyond every cache
    read_bytes_per_s = data.nbytes / best_of(data.sum)
    del data
    flop_per_s: dict[str, float] = {}
    # A processor without bfloat16 instructions is a thousand times slower with it, hence the smaller product.
    for dtype, size in ((torch.float32, 2048), (torch.bfloat16, 512)):
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        flop_per_s[str(dtype).removeprefix("torch.")] = 2 * size**3 / best_of(lambda a=a, b=b: a @ b)
    print(json.dumps({"read_bytes_per_s": read_bytes_per_s, "flop_per_s": flop_per_s}))


if __name__ == "__main__":
    main()

"""What the device can do at most, measured in about a second: copy bandwidth and the rate of matrix products.

Torch is imported when a function is called: the commands' modules import without it.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Far above any cache, and small beside what an engine leaves free."""
_MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
_SUSTAINED_PRODUCTS = {"cuda": 300, "cpu": 10}


def measure_ceilings(device_type: str) -> dict[str, Any]:
    """The row ``ceilings``: TB/s of a device copy (read and written bytes), TFLOP/s of bfloat16 products.

    On a CPU the products are in float32, because most compute bfloat16 no faster; the key's name stays.
    """
    torch: Any = importlib.import_module("torch")
    copied = _copy_bytes_per_s(torch, device_type)
    once, sustained = _products_flop_per_s(torch, device_type)
    if device_type == "cuda":
        torch.cuda.empty_cache()
    return {
        "workload": "ceilings",
        "device": torch.cuda.get_device_name() if device_type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_TBps": copied / 1e12,
        "bf16_TFLOPs": once / 1e12,
        "bf16_sustained_TFLOPs": sustained / 1e12,
    }


def _copy_bytes_per_s(torch: Any, device_type: str) -> float:
    size = _COPY_BYTES[device_type]
    source = torch.arange(size // 8, dtype=torch.int64, device=device_type)
    target = torch.empty_like(source)
    return 2 * size / _median_s(torch, device_type, lambda: target.copy_(source), 20)


def _products_flop_per_s(torch: Any, device_type: str) -> tuple[float, float]:
    """One at a time, and back to back."""
    n, dtype = _MATRIX_SIZE[device_type], torch.bfloat16 if device_type == "cuda" else torch.float32
    generator = torch.Generator(device_type).manual_seed(0)
    a, b = (torch.randn(n, n, dtype=dtype, device=device_type, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    once_s = _median_s(torch, device_type, lambda: torch.mm(a, b, out=out), 40)
    count = _SUSTAINED_PRODUCTS[device_type]

    def many() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    sustained_s = _time_s(torch, device_type, many) / count
    return 2 * n**3 / once_s, 2 * n**3 / sustained_s


def _median_s(torch: Any, device_type: str, call: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(_time_s(torch, device_type, call) for _ in range(repeats))


def _time_s(torch: Any, device_type: str, call: Callable[[], Any]) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device_type != "cuda":
        begin_s = time.perf_counter()
        call()
        return time.perf_counter() - begin_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def memory_row(device_type: str) -> dict[str, int]:
    """Bytes that this process has and had on the device, and what is used there by all. Empty on a CPU."""
    if device_type != "cuda":
        return {}
    cuda: Any = importlib.import_module("torch").cuda
    free, total = cuda.mem_get_info()
    return {
        "gpu_peak_allocated_bytes": cuda.max_memory_allocated(),
        "gpu_peak_reserved_bytes": cuda.max_memory_reserved(),
        "gpu_used_bytes": total - free,
        "gpu_total_bytes": total,
    }


def reset_memory_peak(device_type: str) -> None:
    """Start counting peaks anew."""
    if device_type == "cuda":
        importlib.import_module("torch").cuda.reset_peak_memory_stats()

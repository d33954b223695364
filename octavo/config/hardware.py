"""What the machine offers, as plain data, so that ``resolve()`` stays a pure function. Filled by ``device/``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device and its host."""

    device_type: str
    """``cpu`` or ``cuda``."""
    name: str
    total_memory_bytes: int
    """Of the device; on a CPU the smaller of RAM and the cgroup's limit."""
    free_memory_bytes: int
    """Really available now; on a CPU ``MemAvailable`` within the cgroup's limit."""
    num_threads: int = 1
    """CPU cores that this process may run on."""
    supports_bfloat16: bool = False
    """In hardware: worth computing in."""
    features: tuple[str, ...] = ()
    """Instruction sets or compute capability: ``avx512_vnni``, ``sm_90``, ..."""
    compiles_kernels: bool = False
    """A C compiler is there and may be used: a CPU has more than torch's operators."""

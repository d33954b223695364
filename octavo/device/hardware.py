"""What this host offers, read from the operating system: memory within the control group's limit, cores, instructions.

No torch, no engine: plain numbers for ``config.resolve``. Linux is read from /proc and /sys, anything else through
``psutil`` where it is installed and ``os.sysconf`` where not. The readers take the root folder so that tests can show
them any machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
from pathlib import Path

from octavo.config.hardware import Hardware
from octavo.errors import ConfigError
from octavo.utils.compiler import find_compiler

_UNLIMITED = 1 << 60
"""Control groups v1 write a number near 2^63 for "no limit"."""
_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "bf16": "arm_bf16",
    "i8mm": "arm_i8mm",
    "sve": "sve",
}
"""Flag of /proc/cpuinfo to our name."""
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "arm_bf16"}


def probe_cpu() -> Hardware:
    """This host."""
    total, free = read_cpu_memory()
    name, features = read_cpu_features()
    return Hardware(
        device_type="cpu",
        name=name,
        total_memory_bytes=total,
        free_memory_bytes=free,
        num_threads=count_usable_cores(),
        supports_bfloat16=not _BFLOAT16.isdisjoint(features),
        features=features,
        compiles_kernels=find_compiler()[0] is not None,
    )


def read_cpu_memory(root: Path = Path("/")) -> tuple[int, int]:
    """``(total, free)`` bytes: of the host, or of the control group where that is less.

    Free is ``MemAvailable`` (free pages and caches that can be dropped), cut to what the group's limit leaves above
    its use. File pages of the group that the kernel can drop do not count as use.

    Raises:
        ConfigError: The system tells its memory in none of the known ways.
    """
    host = _read_meminfo(root / "proc/meminfo") or _read_memory_elsewhere()
    if host is None:
        raise ConfigError(
            "cannot find out how much memory this machine has; install psutil, or set kv_cache_memory_bytes",
            param="kv_cache_memory_bytes",
        )
    total, free = host
    for limit, used in _read_cgroup_memory(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return total, free


def _read_meminfo(path: Path) -> tuple[int, int] | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if rest.split()}
    if "MemTotal" not in kib:
        return None
    free = kib.get("MemAvailable", kib.get("MemFree", 0) + kib.get("Cached", 0))
    return kib["MemTotal"] * 1024, free * 1024


def _read_memory_elsewhere() -> tuple[int, int] | None:
    """macOS and others. Without psutil half of the memory is taken as free: there is no portable way to ask."""
    with contextlib.suppress(ImportError):
        virtual = importlib.import_module("psutil").virtual_memory()
        return int(virtual.total), int(virtual.available)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return total, total // 2


def _cgroup_folders(root: Path, controller: str) -> list[tuple[Path, bool]]:
    """Folders of this process's group and its parents, ``(folder, is_v2)``: a limit may stand at any level."""
    folders: list[tuple[Path, bool]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, names, path = line.split(":", 2)
        is_v2 = names == ""
        if not is_v2 and controller not in names.split(","):
            continue
        base = mount if is_v2 else mount / controller
        # Inside a container the path may be the host's; then only the mount point itself is visible.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folders.append((base.joinpath(*parts[:depth]), is_v2))
    return folders


def _read_int(path: Path) -> int | None:
    """The number in a one-line file; None for ``max``, nonsense or no file."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _read_cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """``(limit, used)`` of every level that has a limit."""
    found: list[tuple[int, int]] = []
    for folder, is_v2 in _cgroup_folders(root, "memory"):
        limit = _read_int(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        used = _read_int(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        found.append((limit, max(0, used - _read_droppable(folder, is_v2))))
    return found


def _read_droppable(folder: Path, is_v2: bool) -> int:
    """Inactive file pages of the group: counted as its use, given back under pressure."""
    key = "inactive_file" if is_v2 else "total_inactive_file"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.split()[0] == key:
                return int(line.split()[1])
    return 0


def count_usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on: its affinity mask, cut to the control group's CPU quota, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity mask
        cores = os.cpu_count() or 1
    for folder, is_v2 in _cgroup_folders(root, "cpu"):
        quota = _read_cpu_quota(folder, is_v2)
        if quota is not None:
            cores = min(cores, quota)
    return max(1, cores)


def _read_cpu_quota(folder: Path, is_v2: bool) -> int | None:
    """Whole cores of the quota, rounded up: half a core still needs one thread."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if quota.strip() in ("max", "-1"):
            return None
        return -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def read_cpu_features(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """``(name, features)`` of the processor: instruction sets that our kernels and oneDNN care about."""
    name = platform.processor() or platform.machine() or "cpu"
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return _read_cpu_elsewhere(name)
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return name, tuple(ours for flag, ours in _FEATURES.items() if flag in flags)


def _read_cpu_elsewhere(name: str) -> tuple[str, tuple[str, ...]]:
    """macOS: ask ``sysctl``; elsewhere nothing is known."""
    wanted = {
        "hw.optional.arm.FEAT_BF16": "arm_bf16",
        "hw.optional.arm.FEAT_I8MM": "arm_i8mm",
        "hw.optional.avx2_0": "avx2",
    }
    try:
        done = subprocess.run(
            ["sysctl", "machdep.cpu.brand_string", *wanted], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return name, ()
    values = {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}
    features = tuple(ours for key, ours in wanted.items() if values.get(key) == "1")
    return values.get("machdep.cpu.brand_string", name), features

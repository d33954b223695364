"""Device type to implementation, imported on first use. Knows no configuration; ``device.py`` has the Protocol."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from octavo.config.hardware import Hardware
from octavo.errors import ConfigError

DEVICES = {"cpu": "octavo.device.cpu:CpuDevice", "cuda": "octavo.device.cuda:CudaDevice"}
"""Device type to ``module:Class``."""
PROBES = {"cpu": "octavo.device.hardware:probe_cpu", "cuda": "octavo.device.cuda:probe_cuda"}
"""Device type to ``module:function``; none of these imports torch unless the device needs it."""

_GPU_FILES = ("dev/nvidiactl", "dev/nvidia0", "dev/dxg")
"""What the NVIDIA driver shows on Linux, in containers, and in WSL."""


def _lookup(table: dict[str, str], device_type: str) -> Callable[[], Any]:
    entry = table.get(device_type)
    if entry is None:
        raise ConfigError(
            f"device {device_type!r} is not supported by this version of Octavo; choose one of: {', '.join(table)}",
            param="device",
        )
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def find_device_type(root: Path = Path("/")) -> str:
    """``cuda`` where torch can use a GPU, else ``cpu``. Without a GPU's device file torch is not even imported."""
    if not any((root / file).exists() for file in _GPU_FILES):
        return "cpu"
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


def make_device(device_type: str) -> Any:
    """The Device of this type.

    Returns:
        A ``device.device.Device`` (typed loosely here so that the control half can import this module without torch).

    Raises:
        ConfigError: No such device type.
    """
    return _lookup(DEVICES, device_type)()


def probe_hardware(device_type: str) -> Hardware:
    """What the machine offers, now.

    Raises:
        ConfigError: No such device type.
    """
    return cast(Hardware, _lookup(PROBES, device_type)())

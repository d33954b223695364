"""Device type to implementation, imported on first use. Knows no configuration; ``device.py`` has the Protocol."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from octavo.config.hardware import Hardware
from octavo.errors import ConfigError

DEVICES = {"cpu": "octavo.device.cpu:CpuDevice"}
"""Device type to ``module:Class``."""
PROBES = {"cpu": "octavo.device.hardware:probe_cpu"}
"""Device type to ``module:function``; none of these imports torch unless the device needs it."""


def _lookup(table: dict[str, str], device_type: str) -> Callable[[], Any]:
    entry = table.get(device_type)
    if entry is None:
        raise ConfigError(
            f"device {device_type!r} is not supported by this version of Octavo; choose one of: {', '.join(table)}",
            param="device",
        )
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


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

"""Device: all that the worker asks of the thing it computes on. The CPU has the same surface, synchronously.

Knows no model, no request and no configuration. ``cpu.py`` is the smallest implementation; ``registry.py`` chooses.
Code outside this package never asks "is this CUDA?": it calls a method that is free where it means nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes, now."""

    total: int
    """Of the device; on a CPU the smaller of RAM and the limit of the control group."""
    free: int
    """What could be taken without swapping or being killed."""


class Event(Protocol):
    """A mark in the device's queue."""

    def record(self) -> None:
        """Put the mark behind everything queued so far."""
        ...

    def query(self) -> bool:
        """Whether the device has passed the mark."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds of device time from ``start`` to this mark; both must have been passed."""
        ...


class Device(Protocol):
    """One device of this process."""

    type: ClassVar[str]
    """``cpu`` or ``cuda``."""
    torch_device: torch.device

    def set_num_threads(self, num_threads: int) -> None:
        """Cores for one operation; nothing on an accelerator."""
        ...

    def make_event(self) -> Event: ...

    def use_side_stream(self) -> AbstractContextManager[None]:
        """Work queued inside runs beside the main queue; the caller orders the two with events."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed memory. On a CPU pages become resident only when they are first written."""
        ...

    def upload(self, host: Tensor) -> Tensor:
        """A copy (or, on a CPU, the same tensor) on the device, without waiting for it."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A host tensor that holds the values once an event recorded after this call has been passed."""
        ...

    def memory(self) -> DeviceMemory: ...

    def synchronize(self) -> None:
        """Wait for everything queued."""
        ...

"""Device: all that the worker asks of the thing it computes on. The CPU has the same surface, synchronously.

Knows no model, no request and no configuration. ``cpu.py`` is the smallest implementation; ``registry.py`` chooses.
Code outside this package never asks "is this CUDA?": it calls a method that is free where it means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
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


class Graph(Protocol):
    """Work that was recorded once and is queued as a whole."""

    def replay(self) -> None:
        """Queue it again, over the same memory."""
        ...


class Device(Protocol):
    """One device of this process."""

    type: ClassVar[str]
    """``cpu`` or ``cuda``."""
    is_asynchronous: ClassVar[bool]
    """Whether work goes on after the call that queued it has returned."""
    has_graphs: ClassVar[bool]
    """Whether ``capture`` records anything; without, a graph would only be a detour."""
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

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """As ``upload`` for several arrays, in one copy."""
        ...

    def write(self, target: Tensor, host: Tensor) -> None:
        """Copy ``host`` into ``target``, which is on the device, without waiting for it. Same shape and dtype."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A host tensor that holds the values once an event recorded after this call has been passed."""
        ...

    def capture(self, function: Callable[[], None]) -> Graph:
        """Run ``function`` once, then record it.

        It must queue the same work over the same memory at each call, wait for nothing and upload nothing. All graphs
        of a device share the memory of what they allocate: such a tensor is valid until the next graph runs.
        """
        ...

    def free_unused(self) -> None:
        """Give memory that is held for later use back to the device."""
        ...

    def memory(self) -> DeviceMemory: ...

    def synchronize(self) -> None:
        """Wait for everything queued."""
        ...

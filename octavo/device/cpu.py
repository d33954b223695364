"""The CPU as a Device: everything is done when the call returns, so events are always passed and copies are free.

Knows nothing of models. ``hardware.py`` reads what the machine offers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.device.device import DeviceMemory, Event
from octavo.device.hardware import read_cpu_memory

_BITS_TO_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class CpuEvent:
    """A time stamp: on a CPU what was queued has run."""

    def __init__(self) -> None:
        self.time_s = time.perf_counter()

    def record(self) -> None:
        """Take the time."""
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        """Always passed."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_ms(self, start: Event) -> float:
        """Wall time between two records."""
        assert isinstance(start, CpuEvent)
        return (self.time_s - start.time_s) * 1e3


@dataclass(frozen=True, slots=True)
class CpuGraph:
    """The function itself: there is no cost of launching to save."""

    replay: Callable[[], None]


class CpuDevice:
    """The host itself."""

    type: ClassVar[str] = "cpu"
    is_asynchronous: ClassVar[bool] = False
    has_graphs: ClassVar[bool] = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def set_num_threads(self, num_threads: int) -> None:
        """Torch's pool for one operation; the whole process shares it."""
        torch.set_num_threads(max(1, num_threads))

    def make_event(self) -> Event:
        """An event that is already passed."""
        return CpuEvent()

    def use_side_stream(self) -> contextlib.AbstractContextManager[None]:
        """The only queue there is."""
        return contextlib.nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed memory whose pages are taken on first write.

        ``torch.zeros`` writes every page at once; NumPy asks the system for zero pages (calloc), which costs nothing
        until they are used. That lets a cache sized for the worst case cost only what it holds.
        """
        raw = np.zeros(shape, dtype=_BITS_TO_NUMPY[dtype.itemsize])
        return torch.from_numpy(raw).view(dtype)

    def upload(self, host: Tensor) -> Tensor:
        """The tensor itself."""
        return host

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """The arrays' own memory."""
        return [torch.from_numpy(array) for array in arrays]

    def write(self, target: Tensor, host: Tensor) -> None:
        """A plain copy."""
        target.copy_(host)

    def download(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def capture(self, function: Callable[[], None]) -> CpuGraph:
        """Run it once, as every device does."""
        function()
        return CpuGraph(function)

    def free_unused(self) -> None:
        """Nothing is held."""

    def memory(self) -> DeviceMemory:
        """RAM within the limit of the control group."""
        total, free = read_cpu_memory()
        return DeviceMemory(total=total, free=free)

    def synchronize(self) -> None:
        """Nothing to wait for."""

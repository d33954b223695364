"""An NVIDIA GPU as a Device: one stream, events, pinned memory, graphs.

Everything is queued on the current stream, so order needs no locks: what is uploaded for a step is there when the step
runs, and memory that a step has let go of is reused behind it. The host waits for events only. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.config.hardware import Hardware
from octavo.device.device import DeviceMemory, Event
from octavo.device.hardware import count_usable_cores
from octavo.errors import ConfigError

_RING_SEGMENTS = 4
_SEGMENT_BYTES = 8 * 2**20
_ALIGNMENT = 16
"""Of arrays that travel together, so that each can be viewed in any dtype."""


def probe_cuda() -> Hardware:
    """The current GPU.

    Raises:
        ConfigError: Torch cannot use one; says what torch was built for.
    """
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA at all"
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} (built for {built}) finds no GPU that it can use; check "
            "the driver with nvidia-smi, or use --device cpu",
            param="device",
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return Hardware(
        device_type="cuda",
        name=properties.name,
        total_memory_bytes=total,
        free_memory_bytes=free,
        num_threads=count_usable_cores(),
        supports_bfloat16=properties.major >= 8,
        features=(f"sm_{properties.major}{properties.minor}",),
    )


class CudaEvent:
    """A mark in the current stream that also takes the time."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        """Behind everything queued so far."""
        self._event.record()

    def query(self) -> bool:
        """Whether the device has passed it."""
        return self._event.query()

    def synchronize(self) -> None:
        """Wait for this mark, whatever is queued behind it."""
        self._event.synchronize()

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds of device time."""
        assert isinstance(start, CudaEvent)
        return start._event.elapsed_time(self._event)


class PinnedRing:
    """Pinned host memory for uploads, reused when the copies out of it are done.

    Taken in order from one of several segments. A segment's event is recorded when the ring leaves it and awaited when
    the ring comes back, which is so much later that nobody ever waits.
    """

    def __init__(
        self,
        num_segments: int,
        segment_bytes: int,
        allocate: Callable[[int], Tensor],
        make_event: Callable[[], Event],
    ) -> None:
        self._segments = [allocate(segment_bytes) for _ in range(num_segments)]
        self._left: list[Event | None] = [None] * num_segments
        self._segment_bytes = segment_bytes
        self._allocate = allocate
        self._make_event = make_event
        self._current = 0
        self._offset = 0

    def take(self, num_bytes: int) -> Tensor:
        """``[num_bytes]`` uint8. Queue its copy before the next call."""
        if num_bytes > self._segment_bytes:
            return self._allocate(num_bytes)
        if self._offset + num_bytes > self._segment_bytes:
            event = self._left[self._current] = self._make_event()
            event.record()
            self._current = (self._current + 1) % len(self._segments)
            self._offset = 0
            before = self._left[self._current]
            if before is not None:
                before.synchronize()
        start = self._offset
        self._offset += -(-num_bytes // 256) * 256
        return self._segments[self._current][start : start + num_bytes]


class CudaGraph:
    """A captured graph."""

    __slots__ = ("_graph",)

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        """Queue it on the current stream."""
        self._graph.replay()


class CudaDevice:
    """The current GPU of this process."""

    type: ClassVar[str] = "cuda"
    is_asynchronous: ClassVar[bool] = True
    has_graphs: ClassVar[bool] = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            probe_cuda()  # says why
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._ring = PinnedRing(_RING_SEGMENTS, _SEGMENT_BYTES, _pinned_bytes, CudaEvent)
        self._side_stream: torch.cuda.Stream | None = None
        self._capture_stream: torch.cuda.Stream | None = None
        self._graph_pool: Any = None

    def set_num_threads(self, num_threads: int) -> None:
        """Nothing: the GPU computes. Torch's pool is kept small, because host work here is small pieces."""
        torch.set_num_threads(max(1, min(num_threads, 4)))

    def make_event(self) -> Event:
        """A timed event."""
        return CudaEvent()

    @contextlib.contextmanager
    def use_side_stream(self):  # noqa: ANN201 - a context manager
        """A second stream; the caller orders the two with events."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self.torch_device)
        with torch.cuda.stream(self._side_stream):
            yield

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed memory of the GPU."""
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def upload(self, host: Tensor) -> Tensor:
        """A copy that the host does not wait for."""
        target = torch.empty(host.shape, dtype=host.dtype, device=self.torch_device)
        self.write(target, host)
        return target

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """One copy for all, and views of it."""
        starts: list[int] = []
        total = 0
        for array in arrays:
            starts.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        staged = self._ring.take(total)
        raw = staged.numpy()
        for start, array in zip(starts, arrays, strict=True):
            raw[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = torch.empty(total, dtype=torch.uint8, device=self.torch_device)
        target.copy_(staged, non_blocking=True)
        return [
            target[start : start + array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def write(self, target: Tensor, host: Tensor) -> None:
        """By way of the ring: a copy from ordinary memory would wait behind the stream once it is large."""
        assert target.shape == host.shape and target.dtype is host.dtype
        if host.numel() == 0:
            return
        staged = self._ring.take(host.nbytes).view(host.dtype).view(host.shape)
        staged.copy_(host)
        target.copy_(staged, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """Into pinned memory; torch keeps it until the copy is done and hands it out again later."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def capture(self, function: Callable[[], None]) -> CudaGraph:
        """See Device. The first run compiles kernels and sets up cuBLAS, which must not happen while recording.

        ``torch.cuda.graph`` would collect garbage and empty the allocator's cache each time; dozens of graphs make
        that seconds. Garbage is only kept from being collected: a destructor that calls CUDA would spoil the recording.
        """
        if self._capture_stream is None:
            self._capture_stream = torch.cuda.Stream(self.torch_device)
            self._graph_pool = torch.cuda.graph_pool_handle()
        stream, current = self._capture_stream, torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                function()
                stream.synchronize()
                graph.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        finally:
            if was_collecting:
                gc.enable()
        current.wait_stream(stream)
        return CudaGraph(graph)

    def memory(self) -> DeviceMemory:
        """As the driver counts, so other processes count too; what torch holds without use is given back first."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(total=total, free=free)

    def free_unused(self) -> None:
        """Torch's cached blocks go back to the driver."""
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for everything queued."""
        torch.cuda.synchronize(self.torch_device)


_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}


def _pinned_bytes(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

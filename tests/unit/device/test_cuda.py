"""What of the CUDA device can be seen without a GPU: the ring of pinned memory, and whether there is one at all. Turns
red when memory is handed out again while a copy out of it may still run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.device.cuda import PinnedRing, probe_cuda
from octavo.device.registry import find_device_type
from octavo.errors import ConfigError


class Clock:
    """A stream: events recorded and awaited, in order."""

    def __init__(self) -> None:
        self.recorded = 0
        self.awaited: list[int] = []

    def make_event(self):  # noqa: ANN201
        clock = self

        class Mark:
            number = -1

            def record(self) -> None:
                self.number = clock.recorded
                clock.recorded += 1

            def synchronize(self) -> None:
                clock.awaited.append(self.number)

        return Mark()


def test_a_segment_is_taken_again_only_behind_its_event() -> None:
    clock = Clock()
    allocated: list[int] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    ring = PinnedRing(3, 1024, allocate, clock.make_event)  # type: ignore[arg-type]
    seen: list[int] = []
    for _ in range(3):
        seen += [ring.take(300).data_ptr(), ring.take(512).data_ptr()]
    assert len(set(seen)) == 6 and clock.recorded == 2 and clock.awaited == []
    assert ring.take(1024).data_ptr() == seen[0] and clock.awaited == [0]
    assert ring.take(8).data_ptr() == seen[2] and clock.awaited == [0, 1]
    assert ring.take(8).data_ptr() == seen[2] + 256
    assert allocated == [1024] * 3
    assert len(ring.take(5000)) == 5000 and allocated[-1] == 5000
    assert ring.take(8).data_ptr() == seen[2] + 512, "a large upload leaves the ring alone"


def test_no_device_file_no_gpu(tmp_path: Path) -> None:
    assert find_device_type(tmp_path) == "cpu"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert find_device_type(tmp_path) == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_without_one_says_why() -> None:
    with pytest.raises(ConfigError, match="nvidia-smi"):
        probe_cuda()

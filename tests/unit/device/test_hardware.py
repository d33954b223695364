"""What the machine offers, read from made-up /proc and /sys trees. Turns red when a limit of a container is overlooked,
so that an engine takes memory or cores that it does not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.device import hardware
from octavo.device.registry import make_device, probe_hardware
from octavo.errors import ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {
    "proc/meminfo": "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\nHugePages_Total:    0\n"
}


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert hardware.read_cpu_memory(write(tmp_path, MEMINFO)) == (16 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "expected"),
    [
        (4 * GIB, GIB, 0, (4 * GIB, 3 * GIB)),
        (4 * GIB, 3 * GIB, 2 * GIB, (4 * GIB, 3 * GIB)),  # file pages that can be dropped are not use
        (4 * GIB, 5 * GIB, 0, (4 * GIB, 0)),
        (64 * GIB, GIB, 0, (16 * GIB, 8 * GIB)),  # a limit above the host's memory does not matter
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_memory_within_a_control_group(
    tmp_path: Path, version: int, limit: int, used: int, inactive: int, expected: tuple[int, int]
) -> None:
    if version == 2:
        group = "sys/fs/cgroup/a/b"
        files = {"proc/self/cgroup": "0::/a/b\n", f"{group}/memory.max": "max\n", f"{group}/memory.current": "1\n"}
        parent = "sys/fs/cgroup/a"
        files |= {f"{parent}/memory.max": f"{limit}\n", f"{parent}/memory.current": f"{used}\n"}
        files |= {f"{parent}/memory.stat": f"anon 1\ninactive_file {inactive}\n"}
    else:
        group = "sys/fs/cgroup/memory"  # inside a container the path of the host is not there
        files = {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n"}
        files |= {f"{group}/memory.limit_in_bytes": f"{limit}\n", f"{group}/memory.usage_in_bytes": f"{used}\n"}
        files |= {f"{group}/memory.stat": f"inactive_file 0\ntotal_inactive_file {inactive}\n"}
    assert hardware.read_cpu_memory(write(tmp_path, MEMINFO | files)) == expected


def test_no_limit_in_either_spelling(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n0::/\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "5\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
    }
    assert hardware.read_cpu_memory(write(tmp_path, MEMINFO | files)) == (16 * GIB, 8 * GIB)


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read_memory_elsewhere", lambda: (8 * GIB, 2 * GIB))
    assert hardware.read_cpu_memory(tmp_path) == (8 * GIB, 2 * GIB)
    monkeypatch.setattr(hardware, "_read_memory_elsewhere", lambda: None)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        hardware.read_cpu_memory(tmp_path)


def test_memory_elsewhere_is_found_with_or_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    for blocked in (False, True):
        if blocked:
            monkeypatch.setitem(sys.modules, "psutil", None)
        found = hardware._read_memory_elsewhere()
        assert found is not None
        assert 0 < found[1] <= found[0]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_cores_within_a_quota(
    tmp_path: Path, files: dict[str, str], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert hardware.count_usable_cores(write(tmp_path, files)) == limit


def test_instruction_sets(tmp_path: Path) -> None:
    flags = "fpu avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16"
    text = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: none\n"
    name, features = hardware.read_cpu_features(write(tmp_path, {"proc/cpuinfo": text}))
    assert name == "Some CPU"
    assert set(features) == {"avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_bf16"}


def test_a_mac_is_asked_through_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "machdep.cpu.brand_string: Apple M9\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    monkeypatch.setattr(
        hardware.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, returncode=1, stdout=said)
    )
    assert hardware.read_cpu_features(tmp_path) == ("Apple M9", ("arm_bf16",))


def test_this_machine_is_probed_without_torch() -> None:
    code = (
        "import sys; from octavo.device import probe_hardware; h = probe_hardware('cpu');"
        "assert 'torch' not in sys.modules; print(h.free_memory_bytes, h.total_memory_bytes, h.num_threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, total, threads = map(int, done.stdout.split())
    assert 0 < free <= total and threads >= 1


def test_an_unknown_device_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="cpu"):
        probe_hardware("abacus")
    with pytest.raises(ConfigError, match="cpu"):
        make_device("abacus")


def test_the_cpu_is_a_device_whose_work_is_done() -> None:
    device = make_device("cpu")
    start, end = device.make_event(), device.make_event()
    start.record()
    torch.ones(100_000).sum()
    end.record()
    assert end.query() and end.elapsed_ms(start) > 0
    tensor = torch.arange(3)
    with device.use_side_stream():
        assert device.download(device.upload(tensor)).tolist() == [0, 1, 2]
    for dtype in (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32):
        zeros = device.zeros((2, 3), dtype)
        assert zeros.dtype == dtype and zeros.shape == (2, 3) and not zeros.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident size is read from /proc")
def test_zeroed_memory_is_taken_only_when_it_is_written() -> None:
    # A cache sized for the worst case must not cost a laptop its memory before it is used.
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    device = make_device("cpu")
    before = resident()
    tensor = device.zeros((512, MIB), torch.uint8)
    assert resident() - before < 64 * MIB
    tensor[:128].fill_(1)
    assert resident() - before > 100 * MIB

"""Kernels that were compiled ahead are not compiled at their first launch, and nothing ran before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys
import torch
from triton import knobs
from octavo.kernels.attention.decode import decode_attention, make_work_list
from octavo.kernels.gpu.ahead import compile_ahead
from octavo.kernels.gpu.linear import linear
from octavo.kernels.gpu.norm import add_rms_norm, rms_norm
from octavo.kernels.norm import rms_norm_ref
from octavo.kernels.skinny import SkinnyPlan

torch.manual_seed(0)
sizes = (256, 512, 1024)
rows = [torch.randn(16, size, device="cuda").bfloat16() for size in sizes]
weights = [torch.rand(size, size, device="cuda").bfloat16() for size in sizes]
cache = torch.randn(4, 2, 2, 64, 64, device="cuda").bfloat16()
table = torch.arange(4, device="cuda", dtype=torch.int32).view(1, 4)
start = torch.tensor([0, 1], device="cuda", dtype=torch.int32)
lengths = torch.tensor([200], device="cuda", dtype=torch.int32)
plan = SkinnyPlan(16, 64, 128, 1, 4, 3, True, True, True)


def step(x, weight):
    y = linear(rms_norm(add_rms_norm(x, x, weight[0], 1e-6), weight[0], 1e-6), weight, None, plan)
    q = y[:1, :256].view(1, 4, 64)
    out = torch.empty_like(q)
    work = make_work_list(start, lengths, 2, 4, 64, None)
    decode_attention(q, cache, table, work, out, scale=0.1, window=None, softcap=None)
    return y, out


kept = [x.clone() for x in rows]
if sys.argv[1] == "ahead":
    seen = []
    steps = [lambda x=x, weight=weight: seen.append(step(x, weight)) for x, weight in zip(rows, weights)]
    compile_ahead(steps, 4)
    assert len(seen) == 3
    assert all(not y.any() for y, _ in seen), "a kernel ran"
    assert all(torch.equal(x, before) for x, before in zip(rows, kept))
compiled, missed = [], []
knobs.runtime.jit_post_compile_hook = lambda **known: compiled.append(known["repr"])
knobs.compilation.listener = lambda *, src, cache_hit, **_: None if cache_hit else missed.append(src.name)
for x, weight, before in zip(rows, weights, kept):
    y, out = step(x, weight)
    wanted = rms_norm_ref(rms_norm_ref(before + before, weight[0], 1e-6), weight[0], 1e-6)
    torch.testing.assert_close(y, wanted @ weight.t(), rtol=2e-2, atol=2e-1)
    assert out.isfinite().all() and out.any()
assert not missed, missed
assert not compiled or sys.argv[1] != "ahead", compiled
"""


def test_kernels_are_compiled_side_by_side_and_not_run(tmp_path: Path) -> None:
    """In a process of its own with nothing compiled yet, and for another that comes later and does not do so."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for way in ("ahead", "as it comes"):
        command = [sys.executable, "-c", _SCRIPT, way]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert found.returncode == 0, f"{way}: {found.stderr}"

"""Every attention backend that this GPU and installation have, on random paged batches against the dense reference.

Red when a backend reads a wrong page, key or mask on a real GPU, in any of the shapes that it says it serves.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from octavo.attention.backend import AttentionSpec, unsupported_direction
from octavo.attention.registry import BACKENDS
from octavo.errors import ConfigError
from tests.unit.attention.test_torch_sdpa import check_backend

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
SPECS = {
    "plain": {},
    "head 64, page 16": {"head_dim": 64, "block_size": 16, "scale": 0.125},
    "head 256, page 128": {"head_dim": 256, "block_size": 128, "num_heads": 4, "num_kv_heads": 2, "scale": 0.0625},
    "no groups": {"num_kv_heads": 8},
    "window": {"sliding_window": 100},
    "softcap": {"logit_softcap": 5.0},
    "window and softcap": {"sliding_window": 33, "logit_softcap": 5.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BACKENDS.names())
@pytest.mark.parametrize("spec", SPECS)
def test_backend_equals_reference(spec: str, name: str, dtype: torch.dtype) -> None:
    fields = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 64, "scale": 0.09, **SPECS[spec]}
    asked = AttentionSpec(dtype=dtype, kv_dtype=dtype, **fields)  # type: ignore[arg-type]
    try:
        backend = BACKENDS.load(name)
    except ConfigError as error:
        pytest.skip(error.message)
    reason = unsupported_direction(backend, asked) or backend.unsupported(asked, "cuda")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    if name == "FLEX_ATTENTION" and (dtype is not torch.bfloat16 or fields["head_dim"] == 256):
        asked = replace(asked, num_heads=4, num_kv_heads=2)  # it compiles for seconds per shape: fewer of them
        if spec not in ("plain", "window and softcap"):
            pytest.skip("compiled once per shape; covered in bfloat16")
    rng = random.Random(5)
    work = [(rng.choice([0, 1, 63, 64, 65, 300, 700]), rng.choice([1, 1, 1, 2, 65, 130])) for _ in range(8)]
    tolerance = TOLERANCE[dtype]
    check_backend(
        backend(asked), asked, work, scattered=True, device="cuda", fill=0.0, atol=tolerance, rtol=tolerance,
        padding=0 if name == "FLEX_ATTENTION" else 3,
    )  # fmt: skip

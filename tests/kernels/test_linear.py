"""Products of a few rows: our kernels against torch, and the table that chooses between them and cuBLAS.

The kernels run on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``). Red when a tile, a
part of the columns, the bias or a row is left out or added twice, or when the table names sizes that do not divide.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (IS_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from octavo.kernels.gpu.linear import linear  # noqa: E402
from octavo.kernels.linear import linear_ref  # noqa: E402
from octavo.kernels.skinny import SkinnyPlan, choose_plan  # noqa: E402

# Triton 3.6's interpreter on NumPy 2.
pytestmark = [
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter computes bfloat16 products wrongly (Triton 3.6), so it is tested in float16 there.
DTYPES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]
SHAPES = [(192, 640)] if IS_INTERPRETED else [(128, 256), (1024, 2048), (4096, 14336), (6144, 4096)]
PLANS = {
    "row": SkinnyPlan(1, 4, 128, 1, 4, 1),
    "row, many outputs": SkinnyPlan(1, 16, 128, 1, 8, 1),
    "whole": SkinnyPlan(16, 64, 128, 1, 4, 5),
    "split": SkinnyPlan(16, 64, 128, 2, 4, 5),
    "split in more parts than there are": SkinnyPlan(32, 64, 128, 8, 4, 5),
}


def check(rows: int, outputs: int, columns: int, plan: SkinnyPlan, dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, columns + 16, device=DEVICE).to(dtype)[:, :columns]
    weight = (torch.randn(outputs, columns, device=DEVICE) * columns**-0.5).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if has_bias else None
    expected = linear_ref(x, weight, bias)
    for _ in range(2):  # the second one finds the counters as the first one left them
        result = linear(x, weight, bias, plan)
        tolerance = 1e-3 if dtype is torch.float16 else 1e-2
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True] if IS_INTERPRETED else [False, True], ids=str)
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan: str, outputs: int, columns: int, has_bias: bool, dtype: torch.dtype) -> None:
    rows = 1 if PLANS[plan].block_rows == 1 else PLANS[plan].block_rows - 3
    check(rows, outputs, columns, PLANS[plan], dtype, has_bias)


@pytest.mark.skipif(IS_INTERPRETED, reason="sizes of real models")
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 32])
@pytest.mark.parametrize(
    ("outputs", "columns"),
    [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (6144, 4096), (28672, 4096), (4096, 14336), (960, 576)],
)
def test_chosen_plans(rows: int, outputs: int, columns: int) -> None:
    plan = choose_plan(rows, outputs, columns)
    if plan is not None:
        check(rows, outputs, columns, plan, torch.bfloat16, False)

"""Products of one row, with the norm before and the activation behind them, against plain torch.

Runs on a GPU and in Triton's interpreter. Red when columns are left out, and when something is rounded elsewhere than
by separate kernels.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.kernels.activation import gelu_tanh_and_mul_ref, silu_and_mul_ref
from octavo.kernels.gpu.one_row import one_row
from octavo.kernels.linear import linear_ref
from octavo.kernels.norm import rms_norm_ref
from octavo.kernels.skinny import OneRowPlan, one_row_plan

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
# The interpreter computes bfloat16 products wrongly (Triton 3.6).
DTYPES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
ACTIVATIONS = {None: lambda x: x, "silu": silu_and_mul_ref, "gelu_tanh": gelu_tanh_and_mul_ref}
PLANS = [
    (16, 256, OneRowPlan(4, 128, 1, 4)),
    (16, 384, OneRowPlan(2, 128, 2, 4)),
    (32, 384, OneRowPlan(8, 128, 3, 2)),
    (8, 256, OneRowPlan(8, 256, 4, 4)),
]
"""Outputs, columns: all, some and too few blocks of columns held."""


def operands(outputs: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Row, norm, weight, bias."""
    torch.manual_seed(0)
    shapes = ((1, columns), (columns,), (outputs, columns), (outputs,))
    scales = (1.0, 1.0, columns**-0.5, 1.0)
    return [(torch.randn(shape) * scale).to(DEVICE, dtype) for shape, scale in zip(shapes, scales, strict=True)]


def check(outputs: int, columns: int, plan: OneRowPlan, dtype: torch.dtype, act: str | None) -> None:
    x, norm, weight, bias = operands(outputs * (1 if act is None else 2), columns, dtype)
    residual = torch.randn(1, outputs).to(DEVICE, dtype)
    activate, tolerance = ACTIVATIONS[act], TOLERANCE[dtype]

    def close(result: torch.Tensor, row: torch.Tensor, with_bias: bool) -> None:
        expected = activate(linear_ref(row, weight, bias if with_bias else None))
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)

    close(one_row(x, weight, None, plan, act=act), x, False)
    close(one_row(x, weight, bias, plan, act=act), x, True)
    for wide in (norm, norm.float()):
        normed = rms_norm_ref(x, wide, 1e-5)
        close(one_row(x, weight, None, plan, norm=(wide, 1e-5), act=act), normed, False)
        close(one_row(x, weight, bias, plan, norm=(wide, 1e-5), act=act), normed, True)
    product = one_row(x, weight, bias, plan, act=act)
    total = residual.clone()
    assert one_row(x, weight, bias, plan, act=act, residual=total) is total
    assert torch.equal(total, residual + product)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("outputs", "columns", "plan"), PLANS)
def test_plans(outputs: int, columns: int, plan: OneRowPlan, act: str | None, dtype: torch.dtype) -> None:
    check(outputs, columns, plan, dtype, act)


@pytest.mark.skipif(IS_INTERPRETED, reason="sizes of real models")
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize(
    ("outputs", "columns"), [(4096, 1024), (1024, 3072), (3072, 1024), (6144, 4096), (14336, 4096), (4096, 14336)]
)
def test_chosen_plans(outputs: int, columns: int, act: str | None) -> None:
    for is_normed in (False, True):
        plan = one_row_plan(outputs, columns, is_gated=act is not None, is_normed=is_normed)
        assert plan is not None
        check(outputs, columns, plan, torch.bfloat16, act)

"""Products of up to 256 rows, plain and gated: our kernels against torch, and the table that chooses cuBLAS or them.

The kernels run on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``). Red when a tile, a
part of the columns, the bias or a row is left out or added twice, or when the table names sizes that do not divide.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
import octavo.kernels.linear
from octavo.kernels.activation import (
    gelu_and_mul,
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_ref,
    silu_and_mul,
    silu_and_mul_ref,
)
from octavo.kernels.gpu.linear import gated_linear, linear
from octavo.kernels.linear import linear_ref
from octavo.kernels.skinny import SkinnyPlan, candidates, choose_plan

# Triton 3.6's interpreter on NumPy 2.
pytestmark = [
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
# The interpreter computes bfloat16 products wrongly (Triton 3.6), so it is tested in float16 there.
DTYPES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]
SHAPES = [(192, 640)] if IS_INTERPRETED else [(128, 256), (1024, 2048), (4096, 14336), (6144, 4096)]
PLANS = {
    "whole": SkinnyPlan(16, 64, 128, 1, 4, 5),
    "split": SkinnyPlan(16, 64, 128, 2, 4, 5),
    "split in more parts than there are": SkinnyPlan(32, 64, 128, 8, 4, 5),
}


TILED = {
    "tall": SkinnyPlan(64, 32, 64, 1, 4, 4, False, True, True),
    "tall, split": SkinnyPlan(64, 32, 64, 2, 4, 4, False, True, True),
    "wide, split in three": SkinnyPlan(128, 64, 64, 3, 8, 3, False, True, True),
    "swapped": SkinnyPlan(32, 64, 64, 1, 4, 4, True, True, True),
    "swapped, split": SkinnyPlan(32, 64, 64, 2, 4, 4, True, True, False),
}
"""By bulk copies: they take any number of rows and outputs."""
TILED_ROWS = [100] if IS_INTERPRETED else [17, 31, 33, 64, 100, 256]
TILED_SHAPES = [(72, 200)] if IS_INTERPRETED else [(72, 200), (1000, 1032), (1024, 2048)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def operands(
    rows: int, outputs: int, columns: int, dtype: torch.dtype, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x in rows that are not next to each other, the weight, and a bias or None."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns + 16, device=DEVICE).to(dtype)[:, :columns]
    weight = (torch.randn(outputs, columns, device=DEVICE) * columns**-0.5).to(dtype)
    return x, weight, torch.randn(outputs, device=DEVICE).to(dtype) if has_bias else None


def check(rows: int, outputs: int, columns: int, plan: SkinnyPlan, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands(rows, outputs, columns, dtype, has_bias)
    expected = linear_ref(x, weight, bias)
    for _ in range(2):  # the second one finds the counters as the first one left them
        result = linear(x, weight, bias, plan)
        torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_gated(rows: int, outputs: int, columns: int, plan: SkinnyPlan, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands(rows, 2 * outputs, columns, dtype, has_bias)
    gate_up = linear_ref(x, weight, bias)
    for act, activation in (
        ("silu", silu_and_mul_ref),
        ("gelu_tanh", gelu_tanh_and_mul_ref),
        ("silu", silu_and_mul_ref),
    ):
        result = gated_linear(x, weight, bias, plan, act=act)
        # Gate and up may each round the other way, and are multiplied.
        tolerance = 3 * TOLERANCE[dtype]
        torch.testing.assert_close(result, activation(gate_up), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True] if IS_INTERPRETED else [False, True], ids=str)
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan: str, outputs: int, columns: int, has_bias: bool, dtype: torch.dtype) -> None:
    rows = PLANS[plan].block_rows - 3
    check(rows, outputs, columns, PLANS[plan], dtype, has_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True] if IS_INTERPRETED else [False, True], ids=str)
@pytest.mark.parametrize(("outputs", "columns"), TILED_SHAPES)
@pytest.mark.parametrize("rows", TILED_ROWS)
@pytest.mark.parametrize("plan", TILED)
def test_tiles(plan: str, rows: int, outputs: int, columns: int, has_bias: bool, dtype: torch.dtype) -> None:
    check(rows, outputs, columns, TILED[plan], dtype, has_bias)
    check_gated(rows, outputs, columns, TILED[plan], dtype, has_bias)


AT_ONCE = [
    (SkinnyPlan(64, 32, 128, 1, 4, 1, False, True, True), 72, 200),
    (SkinnyPlan(32, 64, 128, 2, 4, 1, True, True, True), 72, 200),
]
if not IS_INTERPRETED:
    AT_ONCE += [
        (SkinnyPlan(64, 32, 1024, 1, 4, 1, False, True, True), 4096, 1024),
        (SkinnyPlan(64, 32, 512, 1, 4, 1, False, True, True), 1000, 1032 - 8),
        (SkinnyPlan(64, 32, 512, 6, 4, 1, False, True, True), 1024, 3072),
        (SkinnyPlan(32, 64, 512, 4, 4, 1, True, True, True), 1024, 2048),
    ]


@pytest.mark.parametrize("rows", [60] if IS_INTERPRETED else [17, 64, 100])
@pytest.mark.parametrize(("plan", "outputs", "columns"), AT_ONCE)
def test_all_columns_at_once(plan: SkinnyPlan, outputs: int, columns: int, rows: int) -> None:
    """In one step, in two of which the second is shorter, and with parts of which the last is."""
    check(rows, outputs, columns, plan, DTYPES[-1], True)
    if plan.block_columns <= 512:
        check_gated(rows, outputs, columns, plan, DTYPES[-1], True)


def test_the_gated_product_without_bulk_copies() -> None:
    for split in (1, 2):
        check_gated(20, 128, 256, SkinnyPlan(32, 64, 64, split, 4, 4), torch.float16, True)


@pytest.mark.skipif(IS_INTERPRETED, reason="sizes of real models")
@pytest.mark.parametrize("rows", [2, 3, 8, 16, 17, 32, 33, 64, 100, 256])
@pytest.mark.parametrize(
    ("outputs", "columns"),
    [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (6144, 4096), (28672, 4096), (4096, 14336), (960, 576)],
)
def test_chosen_plans(rows: int, outputs: int, columns: int) -> None:
    plan = choose_plan(rows, outputs, columns)
    if plan is not None:
        check(rows, outputs, columns, plan, torch.bfloat16, False)
    plan = choose_plan(rows, outputs // 2, columns, is_gated=True)
    if plan is not None:
        check_gated(rows, outputs // 2, columns, plan, torch.bfloat16, False)


@pytest.mark.skipif(IS_INTERPRETED, reason="sizes of real models")
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [16, 24, 48, 96, 192])
@pytest.mark.parametrize(("outputs", "columns"), [(3072, 1024), (1024, 2048), (4096, 4096)])
def test_candidates(outputs: int, columns: int, rows: int, is_gated: bool) -> None:
    for plan in candidates(rows, outputs, columns, is_gated=is_gated)[:4]:
        (check_gated if is_gated else check)(rows, outputs, columns, plan, torch.bfloat16, False)


@pytest.mark.skipif(IS_INTERPRETED, reason="the dispatch by device")
@pytest.mark.parametrize("activation", [silu_and_mul, gelu_tanh_and_mul, gelu_and_mul])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_dispatch(shift: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Whatever path is taken, and with an x that bulk copies cannot fetch."""
    x = torch.randn(64, 1032, device=DEVICE).to(torch.bfloat16)[:, shift : shift + 1024]
    weight = (torch.randn(6144, 1024, device=DEVICE) / 32).to(torch.bfloat16)
    gate_up = linear_ref(x, weight, None)
    torch.testing.assert_close(octavo.kernels.linear.linear(x, weight), gate_up, rtol=1e-2, atol=1e-2)
    result = octavo.kernels.linear.gated_linear(x, weight, None, activation)
    torch.testing.assert_close(result, activation(gate_up), rtol=3e-2, atol=3e-2)

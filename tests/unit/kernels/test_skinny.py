"""The plans of products with few rows. Red when they name sizes that do not divide, forget a measured weight, or when a
table is not read as it was written."""

from __future__ import annotations

import json

import pytest

from octavo.kernels import skinny
from octavo.kernels.skinny import (
    MAX_ROWS,
    SkinnyPlan,
    candidates,
    choose_plan,
    estimate,
    format_plans,
    one_row_plan,
    parse_table,
)

MEASURED = [
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024),
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
]  # fmt: skip
ODD = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (77, 64), (64, 100), (1, 1), (2048, 8960)]


@pytest.mark.parametrize(("outputs", "columns"), MEASURED + ODD)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_sizes_fit(outputs: int, columns: int, is_gated: bool) -> None:
    for rows in range(2, MAX_ROWS + 1):
        plan = choose_plan(rows, outputs, columns, is_gated=is_gated)
        assert plan is not None or (outputs, columns) in ODD or rows > 8 or is_gated
        if plan is None:
            continue
        if not plan.uses_tma:
            assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0 and rows <= plan.block_rows
        # A part without columns would wait for nothing, but each must have a partial result to add.
        assert plan.split <= columns // plan.block_columns
        assert -(-outputs // plan.block_outputs) * -(-rows // plan.block_rows) <= 4096 or plan.split == 1


@pytest.mark.parametrize(("outputs", "columns"), MEASURED + ODD)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("is_normed", [False, True], ids=["alone", "normed"])
def test_sizes_of_one_row_fit(outputs: int, columns: int, is_gated: bool, is_normed: bool) -> None:
    plan = one_row_plan(outputs, columns, is_gated=is_gated, is_normed=is_normed)
    if plan is None:
        assert (outputs, columns) in ODD
        return
    assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0
    # Weights in registers before the row is there, the row, its norm, and sums in float32.
    held = min(plan.held, columns // plan.block_columns)
    numbers = plan.block_outputs * plan.block_columns
    registers = numbers * (held * (1 + is_gated + 2 * is_normed) / 2 + (1 + is_gated)) / (32 * plan.num_warps)
    assert registers <= 200


def _held(plan: SkinnyPlan, wide: int, columns: int) -> int:
    """Bytes in shared memory: stages of x and weights, or one x and all weights of a program."""
    if plan.stages > 1:
        return 2 * plan.stages * plan.block_columns * (plan.block_rows + wide)
    return 2 * (plan.block_columns * plan.block_rows + columns // plan.split * wide)


@pytest.mark.parametrize(("outputs", "columns"), MEASURED)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_candidates_fit_the_processor(outputs: int, columns: int, is_gated: bool) -> None:
    for rows in (2, 16, 17, 33, 64, 65, 128, 129, 256):
        plans = candidates(rows, outputs, columns, is_gated=is_gated)
        assert plans and all(plan.split * 256 <= columns for plan in plans)
        times = [estimate(plan, rows, outputs, columns, is_gated=is_gated) for plan in plans]
        assert times == sorted(times)
        for plan in plans:
            wide = plan.block_outputs * (2 if is_gated else 1)
            assert _held(plan, wide, columns) <= 224 * 1024, "shared memory"
            assert plan.block_rows * wide <= 255 * 32 * plan.num_warps, "registers"


def test_the_table_names_plans_that_run() -> None:
    assert skinny.measured(), "the table is not found"
    for (outputs, columns, is_gated), plans in skinny.measured().items():
        limits = [limit for limit, _ in plans]
        assert limits == sorted(limits) and limits[-1] <= MAX_ROWS
        for _, plan in plans:
            if plan is None:
                continue
            wide = plan.block_outputs * (2 if is_gated else 1)
            assert _held(plan, wide, columns) <= 224 * 1024
            if plan.stages == 1:
                assert columns <= 2 * plan.split * plan.block_columns, "in at most two steps"
            if not plan.uses_tma:
                assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0
            assert columns % 8 == 0 and plan.split * 128 <= columns


def test_small_weights_get_more_tiles_than_a_library_makes() -> None:
    """[256, 2048] x [1024, 2048] is 16 tiles of 128 x 128 on 132 processors."""
    best = candidates(256, 1024, 2048)[0]
    assert -(-256 // best.block_rows) * (1024 // best.block_outputs) * best.split >= 64


def test_leaves_many_rows_and_huge_weights_alone() -> None:
    assert choose_plan(MAX_ROWS + 1, 4096, 4096) is None
    assert choose_plan(0, 4096, 4096) is None
    assert choose_plan(1, 4096, 4096) is None, "one row has plans of its own"
    assert one_row_plan(2**20, 2**11) is None
    assert one_row_plan(2**18, 2**12, is_gated=True) is None


def test_a_table_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = candidates(24, 576, 1024)[0], candidates(256, 576, 1024)[0]
    entry = format_plans(576, 1024, False, {256: many, 24: few, 64: None})
    table = parse_table(json.loads(json.dumps({"products": [entry]})))
    assert table == {(576, 1024, False): ((24, few), (64, None), (256, many))}
    assert isinstance(table[576, 1024, False][0][1], SkinnyPlan)
    monkeypatch.setattr(skinny, "measured", lambda: table)
    uncached = choose_plan.__wrapped__
    assert [uncached(rows, 576, 1024) for rows in (24, 25, 64, 200, 256)] == [few, None, None, many, many]
    assert uncached(12, 576, 1024) not in (None, few), "half the smallest that was measured is another matter"
    assert uncached(24, 576, 1024, is_gated=True) is None
    table[576, 1024, False] = ((16, few), (24, None))
    assert [uncached(rows, 576, 1024) for rows in (2, 8, 16, 17)] == [few, few, few, None]
    assert uncached(25, 576, 1024) not in (None, few)

"""The table of products with few rows. Red when it names sizes that do not divide, or forgets a measured weight."""

from __future__ import annotations

import pytest

from octavo.kernels.skinny import MAX_ROWS, choose_plan

MEASURED = [
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024),
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
]  # fmt: skip
ODD = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (77, 64), (64, 100), (1, 1), (2048, 8960)]


@pytest.mark.parametrize(("outputs", "columns"), MEASURED + ODD)
def test_sizes_divide(outputs: int, columns: int) -> None:
    for rows in range(1, MAX_ROWS + 1):
        plan = choose_plan(rows, outputs, columns)
        assert plan is not None or (outputs, columns) in ODD
        if plan is not None:
            assert outputs % plan.block_outputs == 0 and columns % plan.block_columns == 0
            assert rows <= plan.block_rows and (rows > 1) == (plan.block_rows > 1)
            # A part without columns would wait for nothing, but each must have a partial result to add.
            assert plan.split <= columns // plan.block_columns
            assert outputs // plan.block_outputs <= 4096 or plan.split == 1


def test_leaves_many_rows_and_huge_weights_alone() -> None:
    assert choose_plan(MAX_ROWS + 1, 4096, 4096) is None
    assert choose_plan(0, 4096, 4096) is None
    assert choose_plan(1, 2**20, 2**11) is None

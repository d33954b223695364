"""Which kernel multiplies a few rows with a weight of a given shape: a small table, measured on an H200.

2026-11-22, torch 2.11 with CUDA 13.0, Triton 3.6, in CUDA graphs over weights larger than the cache; microseconds,
cuBLAS / ours: 1024 x 4096 at one row 5.2 / 3.2, 2048 x 1024 12.6 / 2.7, 14336 x 4096 32.6 / 29.1; at sixteen rows
1024 x 4096 5.2 / 4.3, 3072 x 1024 7.7 / 4.6, 4096 x 4096 13.5 / 11.1. Beyond 32 rows nobody has measured ours ahead.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MAX_ROWS = 32


class SkinnyPlan(NamedTuple):
    """Sizes of one product."""

    block_rows: int
    """1: multiply and add in registers; else rows of a tensor core tile."""
    block_outputs: int
    block_columns: int
    split: int
    """Programs that share the columns of a tile."""
    num_warps: int
    stages: int


@functools.cache
def choose_plan(rows: int, outputs: int, columns: int) -> SkinnyPlan | None:
    """How to multiply ``[rows, columns]`` with ``[outputs, columns]``; None: leave it to cuBLAS."""
    if not 1 <= rows <= MAX_ROWS or outputs * columns >= 2**31:
        return None
    if rows == 1:
        return _one_row(outputs, columns)
    if columns % 128 or outputs % 64:
        return None
    block_rows = 16 if rows <= 16 else 32
    if outputs >= 16384 and outputs % 128 == 0 and columns >= 2048 or outputs >= 65536 and outputs % 128 == 0:
        return SkinnyPlan(block_rows, 128, 128, 1, 8, 4)
    if outputs <= 2048:
        split = 4
    elif outputs <= 4096 and columns >= 4096:
        split = 2
    else:
        split = 1
    while columns < 256 * split:
        split //= 2
    return SkinnyPlan(block_rows, 64, 128, max(split, 1), 4, 5)


def _one_row(outputs: int, columns: int) -> SkinnyPlan | None:
    block_columns = 1024
    while block_columns > columns or columns % block_columns:
        block_columns //= 2
    is_large = outputs * columns > 20_000_000
    block_outputs = (16 if is_large else 4) * (1024 // block_columns if block_columns else 1)
    if block_columns < 128 or outputs % block_outputs:
        return None
    return SkinnyPlan(1, block_outputs, block_columns, 1, 8 if is_large else 4, 1)

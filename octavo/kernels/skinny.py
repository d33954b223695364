"""Which kernel multiplies up to 256 rows with a weight of a given shape: measured plans, else a rule.

One row: ``benchmarks/gpu/single_row.py`` tries sizes in a layer of batch 1, in a CUDA graph over all layers of a model.

More rows: ``benchmarks/gpu/rows.py --write`` measures the plans that ``estimate`` finds promising and puts the winners
into ``tables/``. Where weights are small, up to 32 rows gain by having all weights of a program in shared memory before
x is there, up to 64 by tiles that give every processor one; beyond, x comes so often from the L2 cache that it is level
with cuBLAS, and a weight that was not measured is left to it. docs/log.md, 2026-11-23, has figures.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

MAX_ROWS = 256


class SkinnyPlan(NamedTuple):
    """Sizes of one product."""

    block_rows: int
    """Of a tensor core tile."""
    block_outputs: int
    """Of the result; a gated product's tile holds as many gates and as many ups."""
    block_columns: int
    split: int
    """Programs that share the columns of a tile."""
    num_warps: int
    stages: int
    """1: all columns in one or two steps, and the weights are in shared memory before x is there."""
    is_swapped: bool = True
    """The weight's rows are the tall side of the tensor core's tile, for 16 or 32 rows of x."""
    uses_tma: bool = False
    """Tiles are fetched by bulk copies: any number of outputs, and 8 columns or a multiple of them."""
    prefetches: bool = False
    """Weights are asked into the L2 cache while the kernel before still runs."""


class OneRowPlan(NamedTuple):
    """Sizes of the product of one row."""

    block_outputs: int
    """Of the result; a gated product's program holds as many gates and as many ups."""
    block_columns: int
    held: int
    """Blocks of weights that a program has in registers before the row is there."""
    num_warps: int


_PROCESSORS = 132
_MAX_TILES = 4096
"""Counters that split products have."""

# Of an H200, in bytes or operations a microsecond; a program's time beside what it moves, in microseconds. What all
# processors together draw from the L2 cache is the scarce one: x is fetched again for every tile of outputs.
_DRAM = 4.0e6
_L2 = 6.5e6
_L2_OF_PROCESSOR = 80e3
_FLOPS_OF_PROCESSOR = 5.2e6
_FETCH_US = 0.8
_PART_US = 0.4
"""Of each part of a split tile: whoever adds them waits for all."""
_SHARED_MEMORY = 224 * 1024


def estimate(plan: SkinnyPlan, rows: int, outputs: int, columns: int, *, is_gated: bool = False) -> float:
    """Microseconds from the moment when x is there, beside what every launch costs."""
    tiles = -(-rows // plan.block_rows) * -(-outputs // plan.block_outputs)
    wide = plan.block_outputs * (2 if is_gated else 1)
    span = -(-columns // plan.split)
    programs = tiles * plan.split
    rounds = -(-programs // _PROCESSORS)
    own = 2 * span * min(plan.block_rows, rows)  # rows that are not there are not fetched
    weights = 2 * span * wide
    # The tall side of the tensor core's tile has at least 64.
    multiplied = 2 * span * (max(wide, 64) * plan.block_rows if plan.is_swapped else plan.block_rows * wide)
    from_memory = 2 * outputs * (2 if is_gated else 1) * columns / _DRAM
    if plan.stages == 1:
        # Weights are ahead by about the time of the kernel before; x is fetched, then multiplied.
        steps = -(-span // plan.block_columns)
        fetched = max(programs * own / _L2, rounds * own / _L2_OF_PROCESSOR)
        took = max(from_memory - 1.5, steps * _FETCH_US + fetched + rounds * 2 * multiplied / _FLOPS_OF_PROCESSOR)
    else:
        fetched = max(programs * (own + weights) / _L2, rounds * (own + weights) / _L2_OF_PROCESSOR)
        took = _FETCH_US + max(from_memory, fetched, rounds * multiplied / _FLOPS_OF_PROCESSOR)
    if plan.split > 1:
        took += plan.split * (_PART_US + 4 * plan.block_rows * wide / _L2_OF_PROCESSOR)
    return took


def candidates(rows: int, outputs: int, columns: int, *, is_gated: bool = False) -> list[SkinnyPlan]:
    """Plans worth a measurement for 2 to 256 rows, by ``estimate``, best first."""
    plans: list[SkinnyPlan] = []
    for block_rows, wide, is_swapped in _tiles(rows):
        block_outputs = wide // 2 if is_gated else wide
        if block_outputs < (64 if is_swapped else 16):
            continue
        tiles = -(-rows // block_rows) * -(-outputs // block_outputs)
        for split in (1, 2, 3, 4, 6, 8):
            if split > 1 and (tiles > _MAX_TILES or tiles * split > 2 * _PROCESSORS) or columns < 256 * split:
                continue
            if columns % split == 0:
                plans += _at_once(block_rows, wide, block_outputs, split, columns // split, tiles, is_swapped)
            if split not in (3, 6):
                plans.append(_in_stages(block_rows, wide, block_outputs, split, tiles, is_swapped))
    plans.sort(key=lambda plan: estimate(plan, rows, outputs, columns, is_gated=is_gated))
    return plans


def _tiles(rows: int) -> list[tuple[int, int, bool]]:
    """Rows, weight rows, whether swapped: a tensor core's tall side is at least 64."""
    few = [(16, 64, True), (16, 128, True)] if rows <= 16 else [(32, 64, True), (32, 128, True)]
    if rows <= 32:
        return [*few, (64, 32, False), (64, 64, False)]
    if rows <= 64:
        return [(64, 32, False), (64, 64, False), (64, 128, False)]
    many = [(64, 64, False), (128, 32, False), (128, 64, False), (128, 128, False)]
    return many if rows <= 128 else [*many, (128, 256, False)]


def _at_once(
    block_rows: int, wide: int, block_outputs: int, split: int, span: int, tiles: int, is_swapped: bool
) -> list[SkinnyPlan]:  # fmt: skip
    """All weights of a program in shared memory before x is there, where that fits and all programs run at once."""
    plans: list[SkinnyPlan] = []
    for steps in (1, 2):
        columns = span // steps
        size = 2 * columns * (block_rows + steps * wide)
        is_possible = columns * steps == span and columns & (columns - 1) == 0 and size <= _SHARED_MEMORY
        if is_possible and tiles * split <= _PROCESSORS * (_SHARED_MEMORY // size):
            warps = 8 if block_rows * wide >= 128 * 128 else 4
            plans.append(SkinnyPlan(block_rows, block_outputs, columns, split, warps, 1, is_swapped, True, True))
    return plans


def _in_stages(block_rows: int, wide: int, block_outputs: int, split: int, tiles: int, is_swapped: bool) -> SkinnyPlan:
    """As many stages as shared memory has room for, or half of it where a processor can have two programs."""
    block_columns = 128 if block_rows + wide <= 128 else 64
    is_alone = tiles * split <= _PROCESSORS or block_rows * wide > 128 * 128
    room = _SHARED_MEMORY if is_alone else 104 * 1024
    stages = max(3, min(8, room // (2 * block_columns * (block_rows + wide))))
    warps = 8 if block_rows * wide >= 128 * 128 else 4
    return SkinnyPlan(block_rows, block_outputs, block_columns, split, warps, stages, is_swapped, True, True)


@functools.cache
def choose_plan(rows: int, outputs: int, columns: int, *, is_gated: bool = False) -> SkinnyPlan | None:
    """How to multiply ``[rows, columns]`` with ``[outputs, columns]``, or with twice as many for gate and up.

    Args:
        rows: Of x; one row goes by ``one_row_plan``.
        outputs: Of the result.
        columns: Of x and of the weight.
        is_gated: The weight is ``[2 * outputs, columns]``, and what is wanted is ``act(gate) * up``.

    Returns:
        None: leave it to cuBLAS, and the activation to a launch of its own.
    """
    if not 2 <= rows <= MAX_ROWS or 2 * outputs * columns >= 2**31:
        return None
    plans = measured().get((outputs, columns, is_gated), ())
    # The smallest tile has 16 rows, and takes the same time for fewer.
    if plans and (plans[0][0] <= 16 or plans[0][0] // 2 < rows) and rows <= plans[-1][0]:
        return next(plan for limit, plan in plans if rows <= limit)
    return _few_rows(rows, outputs, columns) if rows <= 32 and not is_gated else None


def _few_rows(rows: int, outputs: int, columns: int) -> SkinnyPlan | None:
    """2 to 32 rows, as measured on 2026-11-22."""
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


@functools.cache
def one_row_plan(
    outputs: int, columns: int, *, is_gated: bool = False, is_normed: bool = False
) -> OneRowPlan | None:  # fmt: skip
    """How to multiply one row, as measured on 2026-11-23.

    Args:
        outputs: Of the result.
        columns: Of x and of the weight.
        is_gated: As in ``choose_plan``.
        is_normed: The row is normalised in each program, which pays where a program has few columns for each thread.

    Returns:
        None: leave it to cuBLAS.
    """
    size = outputs * columns * (2 if is_gated else 1)
    if outputs < 1 or size >= 2**31:
        return None
    if size <= 20_000_000:
        plan = OneRowPlan(4, 1024, 3, 4)
        if is_gated or is_normed:
            plan = OneRowPlan(16, 256, 4 if is_gated else 2, 8)
    elif is_gated:
        plan = OneRowPlan(2, 1024, 4, 4)
    elif is_normed:
        plan = OneRowPlan(4, 1024, 2, 4)
    else:
        plan = OneRowPlan(16, 1024, 1, 8) if outputs >= 65536 else OneRowPlan(8, 1024, 2, 4)
    block_outputs, block_columns = plan.block_outputs, plan.block_columns
    while columns % block_columns:
        # As many numbers a program.
        block_outputs, block_columns = 2 * block_outputs, block_columns // 2
    while outputs % block_outputs:
        block_outputs //= 2
    if block_columns < 128 or block_outputs < 2:
        return None
    return plan._replace(block_outputs=block_outputs, block_columns=block_columns)


TABLE = "tables/skinny_h200.json"
"""Beside this file."""


@functools.cache
def measured() -> Mapping[tuple[int, int, bool], tuple[tuple[int, SkinnyPlan | None], ...]]:
    """``(outputs, columns, is_gated)`` to (largest number of rows, plan), smallest first; None: cuBLAS was faster."""
    file = files("octavo.kernels").joinpath(TABLE)
    return parse_table(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def parse_table(
    table: Mapping[str, Any],
) -> dict[tuple[int, int, bool], tuple[tuple[int, SkinnyPlan | None], ...]]:
    """From the JSON that ``format_plans`` makes."""
    result: dict[tuple[int, int, bool], tuple[tuple[int, SkinnyPlan | None], ...]] = {}
    for entry in table["products"]:
        plans = ((int(limit), None if sizes is None else SkinnyPlan(*sizes)) for limit, sizes in entry["plans"])
        key = (int(entry["outputs"]), int(entry["columns"]), bool(entry["is_gated"]))
        result[key] = tuple(sorted(plans, key=lambda item: item[0]))
    return result


def format_plans(
    outputs: int, columns: int, is_gated: bool, plans: Mapping[int, SkinnyPlan | None]
) -> dict[str, Any]:  # fmt: skip
    """One entry of the table's ``products``: ``plans`` is largest number of rows to plan."""
    rows = [[limit, None if plan is None else list(plan)] for limit, plan in sorted(plans.items())]
    return {"outputs": outputs, "columns": columns, "is_gated": is_gated, "plans": rows}

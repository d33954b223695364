"""Which form and sizes the products of a mixture of experts take on a GPU, by shape and number of tokens.

``default_plan`` reasons from the arithmetic: below a token or so per expert, weights are read for single rows and no
tensor core can help; above, the rows of a tile follow the mean number of rows that an expert has, since a tile with
more is padding. Its sizes are for an H200 and were not measured. ``benchmarks/gpu/moe.py --write`` measures them and
writes a table into ``tables/`` that is read instead, for the device and shapes in it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple


class TileSizes(NamedTuple):
    """Of one grouped product."""

    rows: int
    """Pairs of a tile; the same for both products of a plan."""
    outputs: int
    columns: int
    group: int
    """Tiles of rows that take the same weights one after the other."""
    num_warps: int
    stages: int
    is_swapped: bool
    """Weights are the tall side of the tensor core's tile."""


class PairSizes(NamedTuple):
    """Of the products of single rows."""

    gate_up_outputs: int
    gate_up_columns: int
    down_outputs: int
    down_columns: int
    num_warps: int


class MoePlan(NamedTuple):
    """How a step of so many tokens goes through the experts of one layer: one of three forms."""

    pairs: PairSizes | None = None
    gate_up: TileSizes | None = None
    down: TileSizes | None = None
    """Neither pairs nor tiles: torch's grouped product over sorted rows, bfloat16 only."""


GROUPED_MM = MoePlan()
"""torch's own grouped product."""


class MoeShape(NamedTuple):
    """Of one layer."""

    num_experts: int
    top_k: int
    hidden_size: int
    inner_size: int


_PAIRS_PER_EXPERT = 0.25
"""Up to this many pairs an expert, hardly two share one: 1 - exp(-0.25) of them are hit, 0.22."""


def default_plan(shape: MoeShape, num_tokens: int) -> MoePlan:
    """Sizes for 16-bit weights from arithmetic alone."""
    mean = num_tokens * shape.top_k / shape.num_experts
    if mean <= _PAIRS_PER_EXPERT or num_tokens == 1:
        return MoePlan(pairs=PairSizes(8, _fit(shape.hidden_size, 512), 16, _fit(shape.inner_size, 256), 4))
    if mean <= 8:
        return MoePlan(gate_up=TileSizes(16, 64, 128, 1, 4, 3, True), down=TileSizes(16, 64, 128, 1, 4, 4, True))
    if mean <= 24:
        return MoePlan(gate_up=TileSizes(32, 64, 128, 1, 4, 3, True), down=TileSizes(32, 64, 128, 1, 4, 4, True))
    if mean <= 96:
        return MoePlan(gate_up=TileSizes(64, 64, 64, 4, 4, 4, False), down=TileSizes(64, 128, 64, 4, 4, 4, False))
    return MoePlan(gate_up=TileSizes(128, 128, 64, 8, 8, 3, False), down=TileSizes(128, 128, 64, 8, 8, 4, False))


def choose_plan(device_name: str, shape: MoeShape, num_tokens: int, element_size: int) -> MoePlan:
    """The measured plan where there is one, else ``default_plan``; float32 takes tiles that fit into shared memory.

    Args:
        device_name: As CUDA says it, such as ``NVIDIA H200``; any other name, such as a test's, has no table.
        shape: Of the layer.
        num_tokens: T.
        element_size: Bytes of a weight.
    """
    if element_size != 2:
        plan = default_plan(shape, num_tokens)
        if plan.pairs is not None:
            return plan
        rows = min(64, plan.gate_up.rows if plan.gate_up else 64)
        sizes = TileSizes(rows, 64, 32, 1, 4, 2, False)
        return MoePlan(gate_up=sizes, down=sizes)
    for limit, plan in measured(device_name).get(shape, ()):
        if num_tokens <= limit:
            return plan
    return default_plan(shape, num_tokens)


@functools.cache
def measured(device_name: str) -> Mapping[MoeShape, tuple[tuple[int, MoePlan], ...]]:
    """Plans of a device's table: shape to (largest number of tokens, plan), smallest first."""
    file = files("octavo.kernels.moe").joinpath("tables", table_name(device_name))
    return parse_table(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def table_name(device_name: str) -> str:
    """File name of a device's table."""
    return device_name.strip().lower().replace(" ", "_").replace("/", "_") + ".json"


def parse_table(table: Mapping[str, Any]) -> dict[MoeShape, tuple[tuple[int, MoePlan], ...]]:
    """From the JSON that ``format_plans`` makes."""
    result: dict[MoeShape, tuple[tuple[int, MoePlan], ...]] = {}
    for entry in table["shapes"]:
        plans = [(int(limit), _parse_plan(plan)) for limit, plan in entry["plans"]]
        result[MoeShape(*entry["shape"])] = tuple(sorted(plans))
    return result


def format_plans(shape: MoeShape, plans: Mapping[int, MoePlan]) -> dict[str, Any]:
    """One entry of a table: ``plans`` is largest number of tokens to plan."""
    rows = [
        [limit, {name: list(value) for name, value in plan._asdict().items() if value is not None}]
        for limit, plan in sorted(plans.items())
    ]
    return {"shape": list(shape), "plans": rows}


def _parse_plan(plan: Mapping[str, Any]) -> MoePlan:
    return MoePlan(
        PairSizes(*plan["pairs"]) if "pairs" in plan else None,
        TileSizes(*plan["gate_up"]) if "gate_up" in plan else None,
        TileSizes(*plan["down"]) if "down" in plan else None,
    )


def _fit(size: int, limit: int) -> int:
    """A power of two up to ``limit`` and not far beyond ``size``; what is beyond is masked."""
    return max(64, min(limit, 1 << (size - 1).bit_length()))

"""Stacked experts. Red when a share goes to another expert or projection, or a wrong number goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.layers.parameter import Parameter
from octavo.loader.mapping import Placement, fill
from octavo.loader.source import RowSlice
from octavo.models.interface import Shard, Stack, WeightMap

X, F, E = 3, 2, 4
GATE, UP = torch.arange(X * F * E).reshape(X, F, E).float(), 100.0 + torch.arange(X * F * E).reshape(X, F, E)
PARTS = ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")


class Source:
    """Yields what it was given."""

    def __init__(self, *items: tuple[str, Tensor | RowSlice]) -> None:
        self.items = items

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        return iter([(name, piece) for name, piece in self.items if wanted(name)])


def load(stack: Stack, *items: tuple[str, Tensor | RowSlice]) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}

    def make(name: str) -> Parameter:
        shards = {"gate": F, "up": F}
        return Parameter((2 * F, E), lambda: torch.empty(2 * F, E), lambda t: done.__setitem__(name, t), shards)

    slots = {name: make(name) for name in (f"a.experts.{x}.gate_up_proj.weight" for x in range(X))}
    shards = (Shard("gate_proj", "gate_up_proj", "gate"), Shard("up_proj", "gate_up_proj", "up"))
    fill(Placement(slots, WeightMap(shards=shards, stacks=(stack,))), Source(*items), "file")
    return done


def check(done: dict[str, Tensor]) -> None:
    for x in range(X):
        assert torch.equal(done[f"a.experts.{x}.gate_up_proj.weight"], torch.cat((GATE[x], UP[x])))


def test_one_half_behind_the_other() -> None:
    check(load(Stack("experts.gate_up_proj", PARTS), ("a.experts.gate_up_proj", torch.cat((GATE, UP), 1))))


def test_rows_alternate_and_inputs_come_first() -> None:
    mixed = torch.stack((GATE, UP), 2).flatten(1, 2).transpose(1, 2).contiguous()
    stack = Stack("experts.gate_up_proj", PARTS, is_transposed=True, is_interleaved=True)
    check(load(stack, ("a.experts.gate_up_proj", mixed)))


def test_a_few_experts_at_a_time() -> None:
    whole = torch.cat((GATE, UP), 1)
    pieces = (RowSlice(whole[1:], 1, X), RowSlice(whole[:1], 0, X))
    check(load(Stack("experts.gate_up_proj", PARTS), *(("a.experts.gate_up_proj", piece) for piece in pieces)))


def test_experts_by_themselves_are_taken_too() -> None:
    single = [
        (f"a.experts.{x}.{name}.weight", tensor[x])
        for x in range(X)
        for name, tensor in (("gate_proj", GATE), ("up_proj", UP))
    ]
    check(load(Stack("experts.gate_up_proj", PARTS), *single))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(X + 1, 2 * F, E), "holds 4 experts, but the model's config has another number"),
        (torch.zeros(X - 1, 2 * F, E), "holds 2 experts, but the model's config has another number"),
        (torch.zeros(X, 2 * F + 1, E), "has 5 rows an expert, which 2 parts cannot share"),
        (torch.zeros(X, 2 * F, E + 1), "has shape"),
        (torch.zeros(X), "no stack of matrices"),
    ],
)
def test_what_does_not_fit_is_named(tensor: Tensor, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(Stack("experts.gate_up_proj", PARTS), ("a.experts.gate_up_proj", tensor))
    assert "experts" in caught.value.message


def test_a_missing_expert_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lacks .*experts\.2\.gate_proj"):
        load(
            Stack("experts.gate_up_proj", PARTS),
            ("a.experts.gate_up_proj", RowSlice(torch.cat((GATE, UP), 1)[:2], 0, X)),
        )

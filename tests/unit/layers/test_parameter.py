"""Slots: shards, row slices, completion, and what they refuse. Red when a wrong or repeated tensor is accepted."""

from __future__ import annotations

import pytest
import torch

from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.layers.parameter import Layer, Parameter, collect_slots
from octavo.quantization.unquantized import Unquantized


class Recorder(Unquantized):
    def __init__(self):
        super().__init__()
        self.created = 0
        self.finished = 0

    def create_weights(self, shape):
        self.created += 1
        return super().create_weights(shape)

    def after_load(self, shape, weights):
        self.finished += 1
        return super().after_load(shape, weights)


def test_shards_in_any_order_and_in_row_slices():
    method = Recorder()
    layer = Linear(LayerContext(torch.float32, method, 16), 3, {"q": 4, "k": 2, "v": 2}, bias=True)
    weight, bias = torch.randn(8, 3), torch.randn(8)
    assert method.created == 0, "storage is allocated at the first load"
    assert layer.weight.missing() == ["q", "k", "v"]
    assert layer.weight.expected_shape() == (8, 3)
    assert layer.weight.expected_shape("k") == (2, 3)
    layer.weight.load(weight[6:], "v")
    layer.weight.load(weight[2:4].double(), "q", row_start=2)
    layer.weight.load(weight[4:6], "k")
    assert layer.weight.missing() == ["q"]
    assert method.finished == 0
    layer.weight.load(weight[:2], "q")
    assert (method.created, method.finished, layer.weight.missing()) == (1, 1, [])
    for name, part in zip("qkv", bias.split([4, 2, 2]), strict=True):
        layer.bias.load(part, name)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer.forward(x), x @ weight.t() + bias)


def test_wrong_tensors_are_refused():
    slot = Parameter((4, 3), lambda: torch.empty(4, 3), lambda _: None)
    with pytest.raises(ValueError, match="does not fit"):
        slot.load(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="does not fit"):
        slot.load(torch.zeros(3, 3), row_start=2)
    with pytest.raises(KeyError):
        slot.load(torch.zeros(4, 3), "gate")
    slot.load(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="already loaded"):
        slot.load(torch.zeros(1, 3), row_start=1)
    assert slot.missing() == ["weight"]
    slot.load(torch.zeros(2, 3), row_start=2)
    with pytest.raises(ValueError, match="already loaded"):
        slot.load(torch.zeros(4, 3))


def test_names_follow_attributes_and_shared_parts_appear_once():
    context = LayerContext(torch.float32, Unquantized(), 16)

    class Model(Layer):
        def __init__(self):
            self.blocks = [Linear(context, 2, 2), Linear(context, 2, 2, bias=True)]
            self.head = self.blocks[0]

    assert list(collect_slots(Model())) == ["blocks.0.weight", "blocks.1.weight", "blocks.1.bias"]
    with pytest.raises(TypeError, match="Layer"):
        collect_slots(object())

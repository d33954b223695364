"""A gated layer is its product and the activation, however weights are kept. Red when a bias, a half or a method that
keeps weights in a form of its own is forgotten."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.quantization.int8 import Int8
from octavo.quantization.unquantized import Unquantized


@pytest.mark.parametrize("activation", [silu_and_mul, gelu_tanh_and_mul, gelu_and_mul])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(Unquantized, torch.float32), (Unquantized, torch.bfloat16), (Int8, torch.float32)],
    ids=["float32", "bfloat16", "int8"],
)
def test_gated(method, dtype, activation):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(LayerContext(dtype, method(), 16), 48, {"gate": 32, "up": 32}, bias=True)
    for name in ("gate", "up"):
        layer.weight.load(torch.randn(32, 48, generator=generator), name)
        layer.bias.load(torch.randn(32, generator=generator), name)
    x = torch.randn(5, 48, generator=generator).to(dtype)
    result = layer.forward_gated(x, activation)
    assert result.shape == (5, 32) and result.dtype is dtype
    assert torch.equal(result, activation(layer.forward(x)))

"""What every method promises, and what int8 loses. Red when a weight is rounded worse or a path is wired wrongly."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import ConfigError
from octavo.quantization.int8 import Int8, quantize_weight
from octavo.quantization.method import LinearShape
from octavo.quantization.registry import make_method
from octavo.quantization.unquantized import Unquantized

SHAPE = LinearShape(96, 40, torch.float32)


def apply(method, shape, weight, x, bias):
    weights = method.create_weights(shape)
    weights["weight"].copy_(weight)
    return method.apply(shape, method.after_load(shape, weights), x, bias)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator) * torch.logspace(-3, 0, 40)[:, None]
    x = torch.randn(7, 96, generator=generator) * torch.logspace(-2, 2, 7)[:, None]
    return weight, x, torch.randn(40, generator=generator)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_unquantized_loses_nothing(problem, is_compiled):
    weight, x, bias = problem
    method = Unquantized()
    if not is_compiled:
        method._native = None
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    limit = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None] + bias.abs()
    assert ((apply(method, SHAPE, weight, x, bias) - expected).abs() / limit).max() < 1e-6


def test_unquantized_in_bfloat16(problem):
    weight, x, bias = (tensor.bfloat16() for tensor in problem)
    shape = LinearShape(96, 40, torch.bfloat16)
    assert torch.equal(apply(Unquantized(), shape, weight, x, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_error_is_that_of_the_weights(problem, has_bias):
    """Per output channel and per row: small channels and rows keep their precision beside large ones."""
    weight, x, bias = problem
    bias = bias if has_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    got = apply(Int8(), SHAPE, weight, x, bias)
    limit = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None]
    assert ((got - expected).abs() / limit).max() < 0.004


def test_int8_without_the_compiled_kernel(problem):
    weight, x, bias = problem
    method = Int8()
    method._native = None
    expected = torch.nn.functional.linear(x, weight, bias)
    limit = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None]
    assert ((apply(method, SHAPE, weight, x, bias) - expected).abs() / limit).max() < 0.012
    # The sums of neighbouring products at their largest: 16-bit arithmetic must not saturate.
    x, weight = torch.ones(1, 96), torch.ones(40, 96)
    torch.testing.assert_close(apply(method, SHAPE, weight, x, None), torch.full((1, 40), 96.0), rtol=1e-3, atol=0)


def test_int8_with_bfloat16_activations(problem):
    weight, x, _ = problem
    shape = LinearShape(96, 40, torch.bfloat16)
    got = apply(Int8(), shape, weight, x.bfloat16(), None)
    assert got.dtype is torch.bfloat16
    assert ((got.float() - x @ weight.t()).abs() / (x.norm(dim=1)[:, None] * weight.norm(dim=1)[None])).max() < 0.01


def test_a_channel_of_zeros_stays_zero():
    weight, scale = quantize_weight(torch.zeros(3, 8), 127)
    assert torch.equal(weight * scale[:, None], torch.zeros(3, 8))


def test_names_aliases_and_errors():
    assert make_method("NONE").name == "none"
    assert make_method("w8a8").name == "int8"
    assert make_method("octavo.quantization.unquantized:Unquantized").name == "none"
    with pytest.raises(ConfigError, match="awq.*is not available.*none, int8"):
        make_method("awq")
    with pytest.raises(ConfigError, match="nonsense.*is not known"):
        make_method("nonsense")
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_method("octavo.quantization.unquantized:Missing")

"""The residual stream. Red when a term is added twice or never, when a norm sees the stream of another moment, or when
what is put off is computed although somebody did both at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.layers import stream
from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm, RMSNorm
from octavo.layers.stream import Normed, Product, ResidualStream, as_tensor
from octavo.quantization.unquantized import Unquantized

SIZE = 8


@pytest.fixture
def context() -> LayerContext:
    # On a CPU, weights of float32 are packed.
    return LayerContext(torch.float64, Unquantized(), 16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_norm(context: LayerContext, kind: type[RMSNorm] | type[LayerNorm]) -> RMSNorm | LayerNorm:
    norm = kind(context, SIZE, 1e-5)
    norm.weight.load(normal(SIZE))
    if isinstance(norm, LayerNorm):
        norm.bias.load(normal(SIZE, seed=1))
    return norm


def make_linear(context: LayerContext) -> Linear:
    linear = Linear(context, SIZE, SIZE)
    linear.weight.load(normal(SIZE, SIZE, seed=2))
    return linear


def test_terms_are_added_once_and_in_order() -> None:
    residual, terms = normal(3, SIZE), [normal(3, SIZE, seed=seed) for seed in (1, 2, 3)]
    expected = residual + terms[0] + terms[1] + terms[2]
    held = ResidualStream(residual.clone())
    for term in terms:
        held.add(term)
    torch.testing.assert_close(held.total(), expected)
    torch.testing.assert_close(held.total(), expected)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_sees_what_was_added(context: LayerContext, kind: type[RMSNorm] | type[LayerNorm]) -> None:
    norm, residual, term = make_norm(context, kind), normal(3, SIZE), normal(3, SIZE, seed=1)
    held = ResidualStream(residual.clone())
    held.add(term)
    x = held.normed(norm)
    torch.testing.assert_close(x.tensor(), norm.forward(residual + term))
    assert x.tensor() is x.tensor(), "computed once"
    torch.testing.assert_close(held.total(), residual + term)


def test_without_a_norm_it_is_the_stream() -> None:
    held = ResidualStream(normal(2, SIZE))
    held.add(normal(2, SIZE, seed=1))
    torch.testing.assert_close(held.normed(None).tensor(), normal(2, SIZE) + normal(2, SIZE, seed=1))


def test_a_product_is_what_the_layer_computes(context: LayerContext) -> None:
    linear, x, residual = make_linear(context), normal(3, SIZE, seed=4), normal(3, SIZE)
    product = linear.later(x)
    torch.testing.assert_close(as_tensor(product), linear.forward(x))
    held = ResidualStream(residual.clone())
    held.add(product)
    torch.testing.assert_close(held.total(), residual + linear.forward(x))
    scaled = as_tensor(product).mul_(2.0)
    torch.testing.assert_close(scaled, 2.0 * as_tensor(product), msg="a tensor of its own at each call")


class Together:
    """Kernels that do two things at once, and tell how often they did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(stream, "normed_linear", self.normed_linear)
        monkeypatch.setattr(stream, "add_linear", self.add_linear)

    def normed_linear(
        self, x: torch.Tensor, norm: tuple[torch.Tensor, float], weight: torch.Tensor, bias: Any, activation: Any = None
    ) -> torch.Tensor:
        self.calls.append("norm and product")
        assert activation is None
        wide = torch.nn.functional.rms_norm(x, (SIZE,), norm[0], norm[1])
        return torch.nn.functional.linear(wide, weight, bias)

    def add_linear(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> bool:
        self.calls.append("product and sum")
        residual += torch.nn.functional.linear(x, weight, bias)
        return True


def run(context: LayerContext, residual: torch.Tensor) -> torch.Tensor:
    """Two readers of one norm, a product added, a term that is a tensor, and another reader."""
    norm, linear = make_norm(context, RMSNorm), make_linear(context)
    held = ResidualStream(residual.clone())
    x = held.normed(norm)
    first, second = linear.forward(x), linear.forward(x)
    held.add(Product(linear, first + second))
    third = linear.forward(held.normed(norm))
    held.add(third)
    return linear.forward(held.normed(norm))


def test_both_at_once_is_the_same(context: LayerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    residual = normal(1, SIZE)
    expected = run(context, residual)
    together = Together(monkeypatch)
    torch.testing.assert_close(run(context, residual), expected)
    # The last norm follows a term that is not added yet: one pass for both is what there is already.
    assert together.calls == ["norm and product", "norm and product", "product and sum", "norm and product"]


def test_a_computed_norm_is_not_computed_again(context: LayerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together(monkeypatch)
    x = ResidualStream(normal(1, SIZE)).normed(make_norm(context, RMSNorm))
    assert isinstance(x, Normed)
    x.tensor()
    make_linear(context).forward(x)
    assert together.calls == []

"""The residual stream of a decoder: what each layer reads, and adds to.

Both are put off. An addition waits for the norm behind it, so that one pass does both; a norm waits for the product
behind it, and a product for the addition behind it, so that a step of one row spares launches that would take longer
than what they compute. Whoever wants the rows themselves asks for ``tensor()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from octavo.kernels.linear import Activation, add_linear, normed_linear
from octavo.layers.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from octavo.layers.linear import Linear


class ResidualStream:
    """``[T, E]``, and a term that is not added yet."""

    def __init__(self, residual: Tensor) -> None:
        """Begin with ``residual``, which will be overwritten."""
        self.residual = residual
        self.delta: Tensor | None = None

    def add(self, delta: Tensor | Product) -> None:
        """Add ``[T, E]``, at the next norm at the latest."""
        residual = self.total()
        if isinstance(delta, Product):
            if delta.add_to(residual):
                return
            delta = delta.tensor()
        self.delta = delta

    def total(self) -> Tensor:
        """The stream itself; not to be written."""
        if self.delta is not None:
            self.residual.add_(self.delta)
            self.delta = None
        return self.residual

    def normed(self, norm: RMSNorm | LayerNorm | None) -> Normed:
        """The stream as a layer reads it; to be used before the next ``add``."""
        return Normed(self, norm)


class Normed:
    """The norm of a stream, computed at most once, and only by who needs it."""

    def __init__(self, stream: ResidualStream, norm: RMSNorm | LayerNorm | None) -> None:
        self._stream = stream
        self._norm = norm
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        """``[T, E]``; not to be written."""
        if self._value is None:
            stream = self._stream
            if self._norm is None:
                self._value = stream.total()
            else:
                self._value = self._norm.add_forward(stream.residual, stream.delta)
                stream.delta = None
        return self._value

    def product(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor | None:
        """``kernels.linear.normed_linear`` of the stream; None where ``tensor`` and a product of it are faster."""
        stream, norm = self._stream, self._norm
        if self._value is not None or stream.delta is not None or not isinstance(norm, RMSNorm):
            return None
        return normed_linear(stream.residual, (norm.scale, norm.eps), weight, bias, activation)


class Product:
    """What a layer contributes, not multiplied yet: ``linear.forward(x)``."""

    def __init__(self, linear: Linear, x: Tensor) -> None:
        self._linear = linear
        self._x = x

    def tensor(self) -> Tensor:
        """``[T, out]``, a tensor of its own at each call."""
        return self._linear.forward(self._x)

    def add_to(self, residual: Tensor) -> bool:
        """``residual += tensor()``, if one launch does it; whether it did."""
        weight, bias = self._linear.plain
        return weight is not None and add_linear(residual, self._x, weight, bias)


def as_tensor(x: Tensor | Normed | Product) -> Tensor:
    """The rows themselves."""
    return x if isinstance(x, Tensor) else x.tensor()

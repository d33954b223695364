"""The residual stream of a decoder: what each layer reads, and adds to.

An addition is put off until the norm behind it, so that one pass does both; and the norm is put off until the product
behind it, so that a step of one row spares launches that would take longer than what they compute. Whoever wants the
normalised rows themselves asks for ``Normed.tensor``.
"""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.linear import Activation, normed_linear
from octavo.layers.norm import LayerNorm, RMSNorm


class ResidualStream:
    """``[T, E]``, and a term that is not added yet."""

    def __init__(self, residual: Tensor) -> None:
        """Begin with ``residual``, which may be overwritten."""
        self.residual = residual
        self.delta: Tensor | None = None

    def add(self, delta: Tensor) -> None:
        """Add ``delta [T, E]`` at the next norm."""
        self.total()
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
        if self._value is not None or not isinstance(norm, RMSNorm):
            return None
        both = normed_linear(stream.residual, stream.delta, (norm.scale, norm.eps), weight, bias, activation)
        if both is None:
            return None
        result, stream.residual = both
        stream.delta = None
        return result


def as_tensor(x: Tensor | Normed) -> Tensor:
    """The rows themselves."""
    return x.tensor() if isinstance(x, Normed) else x

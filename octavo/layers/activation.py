"""Gated activations by the name that a model config gives them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from octavo.errors import ConfigError
from octavo.kernels.activation import gelu_tanh_and_mul, silu_and_mul

_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}


def gated_activation(name: str) -> Callable[[Tensor], Tensor]:
    """``[T, 2F] -> [T, F]``: ``act(first half) * second half``; the argument may be overwritten.

    Raises:
        ConfigError: No such activation; lists those that exist.
    """
    if name not in _GATED:
        raise ConfigError(f"hidden_act {name!r} is not supported; supported: {', '.join(_GATED)}", param="hidden_act")
    return _GATED[name]

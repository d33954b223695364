"""Activations by the name that a model config gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from octavo.errors import ConfigError
from octavo.kernels.activation import gelu_and_mul, gelu_tanh_and_mul, relu_and_mul, silu_and_mul

_gelu_tanh: Callable[[Tensor], Tensor] = functools.partial(F.gelu, approximate="tanh")

_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
    "gelu_new": gelu_tanh_and_mul,
    "gelu": gelu_and_mul,
    "relu": relu_and_mul,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


def gated_activation(name: str) -> Callable[[Tensor], Tensor]:
    """``[T, 2F] -> [T, F]``: ``act(first half) * second half``; the argument may be overwritten.

    Raises:
        ConfigError: No such activation; lists those that exist.
    """
    return _find(_GATED, name)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """``[..., F] -> [..., F]``; the argument is left as it is.

    Raises:
        ConfigError: No such activation; lists those that exist.
    """
    return _find(_PLAIN, name)


def _find(table: Mapping[str, Callable[[Tensor], Tensor]], name: str) -> Callable[[Tensor], Tensor]:
    if name not in table:
        raise ConfigError(f"hidden_act {name!r} is not supported; supported: {', '.join(table)}", param="hidden_act")
    return table[name]

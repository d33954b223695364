"""``y = x W^T + b`` for weights as they are, and ``act(gate) * up`` of such a product."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.skinny import MAX_ROWS, SkinnyPlan, choose_plan


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` times ``weight [N, K]``, plus ``bias [N]``, summed in float32. Returns ``[T, N]`` of x's dtype."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``linear_ref``; on a GPU by our own kernels where these are known to be faster than cuBLAS."""
    plan = _plan(x, weight, is_gated=False)
    return F.linear(x, weight, bias) if plan is None else gpu_kernels("linear").linear(x, weight, bias, plan)


Activation = Callable[[Tensor], Tensor]
"""``[T, 2F] -> [T, F]``: ``act(first half) * second half``; the argument may be overwritten."""
_FUSED: dict[Activation, bool] = {silu_and_mul: False, gelu_tanh_and_mul: True}
"""Activations that the product's own kernel knows, and whether it is GELU."""


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """``activation(linear(x, weight, bias))``, in one launch where that is known to be faster.

    Args:
        x: ``[T, K]``.
        weight: ``[2F, K]``, gate first.
        bias: ``[2F]``.
        activation: Of ``kernels/activation.py``.

    Returns:
        ``[T, F]``, rounded as the product and the activation one after the other are.
    """
    plan = _plan(x, weight, is_gated=True) if activation in _FUSED else None
    if plan is None:
        return activation(linear(x, weight, bias))
    return gpu_kernels("linear").gated_linear(x, weight, bias, plan, is_gelu=_FUSED[activation])


def _plan(x: Tensor, weight: Tensor, *, is_gated: bool) -> SkinnyPlan | None:
    if not (x.is_cuda and len(x) <= MAX_ROWS and x.dim() == 2 and x.element_size() == 2 and _is_measured(x.device)):
        return None
    outputs, columns = weight.shape
    plan = choose_plan(len(x), outputs // 2 if is_gated else outputs, columns, is_gated=is_gated)
    if plan is None or not weight.is_contiguous() or x.stride(1) != 1:
        return None
    # Bulk copies want whole 16 bytes.
    return plan if not plan.uses_tma or (x.data_ptr() | weight.data_ptr() | 2 * x.stride(0)) % 16 == 0 else None


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """The plans are for Hopper; elsewhere nobody has compared."""
    return torch.cuda.get_device_capability(device)[0] == 9

"""``y = x W^T + b`` for weights as they are, and ``act(gate) * up`` of such a product."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.skinny import MAX_ROWS, OneRowPlan, SkinnyPlan, choose_plan, one_row_plan

Activation = Callable[[Tensor], Tensor]
"""``[T, 2F] -> [T, F]``: ``act(first half) * second half``; the argument may be overwritten."""
_FUSED: dict[Activation, str] = {silu_and_mul: "silu", gelu_tanh_and_mul: "gelu_tanh"}
"""Activations that the kernels of products know, and what they call them."""


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` times ``weight [N, K]``, plus ``bias [N]``, summed in float32. Returns ``[T, N]`` of x's dtype."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``linear_ref``; on a GPU by our own kernels where these are known to be faster than cuBLAS."""
    if len(x) == 1:
        plan = _one_row_plan(x, weight, is_gated=False, is_normed=False)
        return F.linear(x, weight, bias) if plan is None else gpu_kernels("one_row").one_row(x, weight, bias, plan)
    plan = _plan(x, weight, is_gated=False)
    return F.linear(x, weight, bias) if plan is None else gpu_kernels("linear").linear(x, weight, bias, plan)


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
    if activation in _FUSED and len(x) == 1:
        plan = _one_row_plan(x, weight, is_gated=True, is_normed=False)
        if plan is not None:
            return gpu_kernels("one_row").one_row(x, weight, bias, plan, act=_FUSED[activation])
    elif activation in _FUSED:
        plan = _plan(x, weight, is_gated=True)
        if plan is not None:
            return gpu_kernels("linear").gated_linear(x, weight, bias, plan, act=_FUSED[activation])
    return activation(linear(x, weight, bias))


def normed_linear(
    x: Tensor, norm: tuple[Tensor, float], weight: Tensor, bias: Tensor | None, activation: Activation | None = None
) -> Tensor | None:
    """``linear``, or ``gated_linear`` with ``activation``, of the RMSNorm of ``x``, in one launch.

    Args:
        x: ``[T, K]``.
        norm: Weight ``[K]`` and epsilon.
        weight: ``[N, K]``.
        bias: ``[N]``.
        activation: Of ``kernels/activation.py``.

    Returns:
        The result, rounded as that of separate launches; None where these are faster: nothing has been done then.
    """
    if len(x) != 1 or (activation is not None and activation not in _FUSED):
        return None
    plan = _one_row_plan(x, weight, is_gated=activation is not None, is_normed=True)
    if plan is None:
        return None
    act = None if activation is None else _FUSED[activation]
    return gpu_kernels("one_row").one_row(x, weight, bias, plan, norm=norm, act=act)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """``residual += linear(x, weight, bias)`` in one launch, rounded as separate ones do.

    Returns:
        False where these are faster: nothing has been done then.
    """
    plan = _one_row_plan(x, weight, is_gated=False, is_normed=False) if len(x) == 1 else None
    if plan is None or not residual.is_contiguous():
        return False
    gpu_kernels("one_row").one_row(x, weight, bias, plan, residual=residual)
    return True


def _one_row_plan(x: Tensor, weight: Tensor, *, is_gated: bool, is_normed: bool) -> OneRowPlan | None:
    if not (x.is_cuda and x.dim() == 2 and x.element_size() == 2 and _is_measured(x.device)):
        return None
    if not weight.is_contiguous() or x.stride(1) != 1:
        return None
    outputs, columns = weight.shape
    return one_row_plan(outputs // 2 if is_gated else outputs, columns, is_gated=is_gated, is_normed=is_normed)


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

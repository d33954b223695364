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
    plan = _choose(x, weight, is_gated=False)
    return F.linear(x, weight, bias) if plan is None else _multiply(x, weight, bias, plan)


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
    plan = _choose(x, weight, is_gated=True) if activation in _FUSED else None
    if plan is None:
        return activation(linear(x, weight, bias))
    return _multiply(x, weight, bias, plan, _FUSED[activation])


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
    if activation is not None and activation not in _FUSED:
        return None
    plan = _choose(x, weight, is_gated=activation is not None, is_normed=True)
    if not isinstance(plan, OneRowPlan):
        return None
    act = None if activation is None else _FUSED[activation]
    return gpu_kernels("one_row").one_row(x, weight, bias, plan, norm=norm, act=act)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """``residual += linear(x, weight, bias)`` in one launch, rounded as separate ones do.

    Returns:
        False where these are faster: nothing has been done then.
    """
    plan = _choose(x, weight, is_gated=False)
    if not isinstance(plan, OneRowPlan) or not residual.is_contiguous():
        return False
    gpu_kernels("one_row").one_row(x, weight, bias, plan, residual=residual)
    return True


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: OneRowPlan | SkinnyPlan, act: str | None = None
) -> Tensor:
    if isinstance(plan, OneRowPlan):
        return gpu_kernels("one_row").one_row(x, weight, bias, plan, act=act)
    kernels = gpu_kernels("linear")
    if act is None:
        return kernels.linear(x, weight, bias, plan)
    return kernels.gated_linear(x, weight, bias, plan, act=act)


def _choose(x: Tensor, weight: Tensor, *, is_gated: bool, is_normed: bool = False) -> OneRowPlan | SkinnyPlan | None:
    """How our own kernels multiply these; None: not at all, or slower than cuBLAS."""
    if not (x.is_cuda and len(x) <= MAX_ROWS and x.dim() == 2 and x.element_size() == 2 and _is_measured(x.device)):
        return None
    if not weight.is_contiguous() or x.stride(1) != 1:
        return None
    outputs, columns = weight.shape
    outputs = outputs // 2 if is_gated else outputs
    if len(x) == 1:
        return one_row_plan(outputs, columns, is_gated=is_gated, is_normed=is_normed)
    plan = choose_plan(len(x), outputs, columns, is_gated=is_gated)
    if plan is not None and plan.uses_tma and (x.data_ptr() | weight.data_ptr() | 2 * x.stride(0)) % 16:
        return None  # bulk copies want whole 16 bytes
    return plan


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """The plans are for Hopper; elsewhere nobody has compared."""
    return torch.cuda.get_device_capability(device)[0] == 9

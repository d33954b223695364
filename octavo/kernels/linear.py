"""``y = x W^T + b`` for weights as they are."""

from __future__ import annotations

import enum
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.activation import gelu_tanh_and_mul, gelu_tanh_and_mul_ref, silu_and_mul, silu_and_mul_ref
from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.norm import rms_norm_ref
from octavo.kernels.skinny import MAX_ROWS, choose_plan


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` times ``weight [N, K]``, plus ``bias [N]``, summed in float32. Returns ``[T, N]`` of x's dtype."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``linear_ref``; on a GPU by our own kernels where these are known to be faster than cuBLAS."""
    if x.is_cuda and len(x) <= MAX_ROWS and x.dim() == 2 and x.element_size() == 2 and _is_measured(x.device):
        plan = choose_plan(len(x), *weight.shape)
        if plan is not None and weight.is_contiguous() and x.stride(1) == 1:
            return gpu_kernels("linear").linear(x, weight, bias, plan)
    return F.linear(x, weight, bias)


class Gate(enum.IntEnum):
    """What is made of a row of gate and up, ``[1, 2K]``, before it is multiplied."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2


def row_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
    gate: Gate = Gate.NONE, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One row through a norm or a gated activation, a product, and an addition: what stands between two attentions.

    Args:
        x: ``[1, K]``, or ``[1, 2K]`` with a gate; read only.
        weight: ``[N, K]``.
        bias: ``[N]``.
        norm: Weight ``[K]`` and epsilon of an RMSNorm over ``x``.
        gate: ``act(first half) * second half`` instead.
        add_to: ``[1, N]``; the product is added to it and it is returned.

    Returns:
        ``[1, N]``, rounded where the steps one by one round.
    """
    if norm is not None:
        x = rms_norm_ref(x, *norm)
    if gate is not Gate.NONE:
        x = (silu_and_mul_ref if gate is Gate.SILU else gelu_tanh_and_mul_ref)(x)
    y = linear_ref(x, weight, bias)
    return y if add_to is None else add_to.add_(y)


def apply_gate(x: Tensor, gate: Gate) -> Tensor:
    """The gated product of ``x [T, 2K]``; ``x`` itself without a gate. ``x`` may be overwritten."""
    if gate is Gate.NONE:
        return x
    return silu_and_mul(x) if gate is Gate.SILU else gelu_tanh_and_mul(x)


def has_row_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether ``row_linear`` is faster than the steps one by one."""
    if not x.is_cuda or len(x) != 1 or x.element_size() != 2 or not _is_measured(x.device):
        return False
    return x.is_contiguous() and weight.is_contiguous() and choose_plan(1, *weight.shape) is not None


def row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
    gate: Gate = Gate.NONE, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``row_linear_ref``, in one launch; only where ``has_row_kernel``."""
    plan = choose_plan(1, *weight.shape)
    assert plan is not None, "ask has_row_kernel first"
    out = torch.empty((1, len(weight)), dtype=x.dtype, device=x.device) if add_to is None else add_to
    gpu_kernels("linear").multiply_row(x, weight, bias, out, plan, norm=norm, gate=int(gate), adds=add_to is not None)
    return out


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """The plans are for Hopper; elsewhere nobody has compared."""
    return torch.cuda.get_device_capability(device)[0] == 9

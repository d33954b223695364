"""``y = x W^T + b`` for weights as they are."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels
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


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """The plans are for Hopper; elsewhere nobody has compared."""
    return torch.cuda.get_device_capability(device)[0] == 9

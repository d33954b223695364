"""Gated activations of feed-forward blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.native import native_kernels


def silu_and_mul_ref(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``gate_up [T, 2F]``, gate first. Returns ``[T, F]``, contiguous."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_and_mul_ref(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the tanh approximation, for ``gate_up [T, 2F]``. Returns ``[T, F]``, contiguous."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As ``silu_and_mul_ref``, by the compiled kernel where it applies; ``gate_up`` may be overwritten."""
    if gate_up.is_cuda:
        return gpu_kernels("activation").gated(gate_up, is_gelu=False)
    if gate_up.dtype is torch.float32 and gate_up.is_contiguous():
        native = native_kernels()
        if native is not None and gate_up.device.type == "cpu":
            return native.silu_and_mul(gate_up)
    size = gate_up.shape[-1] // 2
    return torch.mul(F.silu(gate_up[:, :size], inplace=True), gate_up[:, size:])


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """As ``gelu_tanh_and_mul_ref``."""
    if gate_up.is_cuda:
        return gpu_kernels("activation").gated(gate_up, is_gelu=True)
    size = gate_up.shape[-1] // 2
    return torch.mul(F.gelu(gate_up[:, :size], approximate="tanh"), gate_up[:, size:])


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the error function, for ``gate_up [T, 2F]``. Returns ``[T, F]``, contiguous."""
    size = gate_up.shape[-1] // 2
    return torch.mul(F.gelu(gate_up[:, :size]), gate_up[:, size:])


def relu_and_mul(gate_up: Tensor) -> Tensor:
    """``relu(gate) * up`` for ``gate_up [T, 2F]``. Returns ``[T, F]``, contiguous; ``gate_up`` may be overwritten."""
    size = gate_up.shape[-1] // 2
    return torch.mul(F.relu(gate_up[:, :size], inplace=True), gate_up[:, size:])

"""The experts of a layer: each token through its k experts, summed by their routing weights.

On a GPU nothing is read by the host, so a step can be captured. On a CPU the loop is over the experts that were hit:
each multiplies all of its tokens at once, by whatever holds its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.moe.plans import GROUPED_MM, MoePlan, MoeShape, choose_plan, default_plan


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between the two products."""

    kind: str = "silu"
    """``silu``, ``gelu_tanh``: act(gate) * up. ``clamped_swiglu``: gate * sigmoid(alpha * gate) * (up + 1), with gate
    at most ``limit`` and up within it."""
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_up: Tensor) -> Tensor:
        """``[..., 2F]``, gate first, to ``[..., F]``; the argument may be overwritten."""
        if self.kind == "silu":
            return silu_and_mul(gate_up)
        if self.kind == "gelu_tanh":
            return gelu_tanh_and_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    @property
    def key(self) -> tuple[str, float, float]:
        """For kernels."""
        return self.kind, self.alpha, self.limit


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The weights of all experts of a layer, each kind in one contiguous tensor."""

    gate_up: Tensor
    """[X, 2F, E], gate rows before up rows."""
    down: Tensor
    """[X, E, F]."""
    gate_up_bias: Tensor | None = None
    """[X, 2F]."""
    down_bias: Tensor | None = None
    """[X, E]."""


def experts_ref(x: Tensor, tensors: ExpertTensors, weights: Tensor, experts: Tensor, activation: Activation) -> Tensor:
    """Every pair by itself, in float32.

    Args:
        x: ``[T, E]``.
        tensors: Of the layer.
        weights: ``[T, K]`` float32.
        experts: ``[T, K]`` int32.
        activation: Between the products.

    Returns:
        ``[T, E]`` of x's dtype.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token, row in enumerate(experts.tolist()):
        for k, expert in enumerate(row):
            inner = tensors.gate_up[expert].float() @ x[token].float()
            if tensors.gate_up_bias is not None:
                inner = inner + tensors.gate_up_bias[expert].float()
            y = tensors.down[expert].float() @ activation(inner[None])[0]
            if tensors.down_bias is not None:
                y = y + tensors.down_bias[expert].float()
            out[token] += weights[token, k] * y
    return out.to(x.dtype)


def combine_ref(parts: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """Sum ``parts [T * K, E]`` over a token's K experts in float32, times ``weights [T, K]`` if given: ``[T, E]``."""
    wide = parts.float().unflatten(0, (-1, top_k))
    return (wide if weights is None else wide * weights[..., None]).sum(1).to(parts.dtype)


def experts_on_host(
    x: Tensor, weights: Tensor, experts: Tensor, num_experts: int, apply: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The loop over experts that were hit; waits for ``experts`` where they are computed, so for CPUs only.

    Args:
        x: ``[T, E]``.
        weights: ``[T, K]`` float32.
        experts: ``[T, K]`` int32.
        num_experts: X.
        apply: ``(expert, its tokens [R, E]) -> [R, E]``: both products with the activation between them.

    Returns:
        ``[T, E]`` of x's dtype; a token's experts are added in the order of their numbers.
    """
    flat = experts.flatten()
    top_k = experts.shape[1]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    rows, scale = order // top_k, weights.flatten()[order, None].to(x.dtype)
    gathered = x[rows] if len(x) > 1 else x.expand(top_k, -1)
    out = torch.zeros_like(x)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            out.index_add_(0, rows[start:end], apply(expert, gathered[start:end]) * scale[start:end])
            start = end
    return out


def experts_on_gpu(
    x: Tensor, tensors: ExpertTensors, weights: Tensor, experts: Tensor, activation: Activation
) -> Tensor:
    """As ``experts_ref``, by the Triton kernels or torch's grouped product, whichever the plan names."""
    shape = MoeShape(len(tensors.gate_up), experts.shape[1], x.shape[1], tensors.down.shape[2])
    plan = choose_plan(_device_name(x.device), shape, len(x), x.element_size())
    if plan == GROUPED_MM and x.dtype is not torch.bfloat16:  # all that torch's product takes on a GPU
        plan = default_plan(shape, len(x))
    return experts_by_plan(x, tensors, weights, experts, activation, plan)


@functools.cache
def _device_name(device: torch.device) -> str:
    # The interpreter of tests runs on a CPU.
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def experts_by_plan(
    x: Tensor, tensors: ExpertTensors, weights: Tensor, experts: Tensor, activation: Activation, plan: MoePlan
) -> Tensor:
    """As ``experts_on_gpu``, with the sizes given."""
    gemm = gpu_kernels("moe_gemm")
    if plan.pairs is not None:
        gate_up = tensors.gate_up, tensors.gate_up_bias
        down = tensors.down, tensors.down_bias
        return gemm.experts_by_pairs(x, gate_up, down, weights, experts, plan.pairs, activation.key)
    top_k = experts.shape[1]
    moe = gpu_kernels("moe")
    if plan.gate_up is None or plan.down is None:
        return moe.combine(*_grouped_mm(x, tensors, experts, activation), weights)
    tiles = moe.align(experts, len(tensors.gate_up), plan.gate_up.rows)
    inner = gemm.gate_up_tiles(x, tensors.gate_up, tensors.gate_up_bias, top_k, tiles, plan.gate_up, activation.key)
    parts = gemm.down_tiles(inner, tensors.down, tensors.down_bias, weights, tiles, plan.down)
    return moe.combine(parts, top_k)


def _grouped_mm(x: Tensor, tensors: ExpertTensors, experts: Tensor, activation: Activation) -> tuple[Tensor, int]:
    """The outputs ``[T * K, E]`` of all pairs, not weighed yet, by torch's own grouped product; and K."""
    top_k, num_experts = experts.shape[1], len(tensors.gate_up)
    chosen, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(num_experts, dtype=torch.int32, device=x.device), right=True)
    ends = ends.to(torch.int32)
    inner = F.grouped_mm(x[order // top_k], tensors.gate_up.transpose(1, 2), offs=ends)
    if tensors.gate_up_bias is not None:
        inner += tensors.gate_up_bias[chosen]
    parts = F.grouped_mm(activation(inner), tensors.down.transpose(1, 2), offs=ends)
    if tensors.down_bias is not None:
        parts += tensors.down_bias[chosen]
    return torch.empty_like(parts).index_copy_(0, order, parts), top_k

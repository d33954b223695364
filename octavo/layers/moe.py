"""MixtureOfExperts: a router, its experts, and a shared part that every token goes through.

Parameters have the names of one expert each (``experts.7.gate_up_proj.weight``): checkpoints that stack them are cut
into these by the loader. On a GPU the experts of a layer lie in one tensor, for the grouped products; elsewhere each is
two linear layers, so that any quantisation method serves. The router is never quantised: it is small, and an expert
chosen wrongly is a large error.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.config.moe import MoeConfig
from octavo.errors import ConfigError
from octavo.kernels.linear import linear
from octavo.kernels.moe.experts import Activation, ExpertTensors, experts_on_gpu, experts_on_host
from octavo.kernels.moe.routing import Routing, Scoring, route
from octavo.layers.context import LayerContext
from octavo.layers.linear import Linear
from octavo.layers.parameter import Layer, Parameter
from octavo.layers.stream import Normed, Product, as_tensor

_KINDS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class SharedExpert(Protocol):
    """What every token goes through besides its experts."""

    def forward(self, x: Tensor) -> Tensor | Product:
        """``[T, E] -> [T, E]``, a tensor of its own."""
        ...


class MixtureOfExperts(Layer):
    """``sum over a token's experts of weight * expert(x)``, plus the shared part, through its gate if it has one."""

    def __init__(
        self,
        context: LayerContext,
        moe: MoeConfig,
        hidden_size: int,
        hidden_act: str,
        shared_expert: SharedExpert | None = None,
    ) -> None:
        """Define the layer with empty weights.

        Args:
            context: Of the model.
            moe: Experts and router.
            hidden_size: E.
            hidden_act: Activation of the experts, where ``moe`` names none.
            shared_expert: The shared part.

        Raises:
            ConfigError: The activation or the quantisation does not work with experts.
        """
        self.gate = Router(context, moe, hidden_size)
        activation = _activation(moe, hidden_act)
        is_stacked = context.device.type != "cpu"
        make = StackedExperts if is_stacked else SingleExperts
        self._experts = make(context, moe, hidden_size, activation)
        self.experts = self._experts.members
        if shared_expert is not None:
            self.shared_expert = shared_expert
        self._shared_expert = shared_expert
        if moe.has_shared_gate:
            self.shared_expert_gate = PlainWeight(context, (1, hidden_size))
        self._shared_gate = self.shared_expert_gate if moe.has_shared_gate else None

    def forward(self, x: Tensor | Normed) -> Tensor:
        """``[T, E] -> [T, E]``."""
        x = as_tensor(x)
        weights, chosen = self.gate.forward(x)
        out = self._experts.forward(x, weights, chosen)
        if self._shared_expert is not None:
            shared = as_tensor(self._shared_expert.forward(x))
            if self._shared_gate is not None:
                shared = shared.mul_(torch.sigmoid(linear(x, self._shared_gate.values)))
            out += shared
        return out


class Router(Layer):
    """Logits of the experts, and the choice among them."""

    def __init__(self, context: LayerContext, moe: MoeConfig, hidden_size: int) -> None:
        self._dtype = torch.float32 if moe.is_wide_router else context.dtype
        self._weight = self._bias = self._correction = None
        self._rule = Routing(
            moe.top_k,
            Scoring(moe.scoring),
            is_normalised=moe.is_normalised,
            scale=moe.scale,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
            is_group_of_two=moe.is_group_of_two,
            jitter=moe.jitter,
        )
        count = moe.num_experts

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=context.device)

        self.weight = Parameter(
            (count, hidden_size), lambda: empty(self._dtype, count, hidden_size), self._finish_weight
        )
        if moe.has_router_bias:
            self.bias = Parameter((count,), lambda: empty(self._dtype, count), self._finish_bias)
        if moe.has_correction:
            self.e_score_correction_bias = Parameter(
                (count,), lambda: empty(torch.float32, count), self._finish_correction
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, E]`` to weights ``[T, K]`` float32 and experts ``[T, K]`` int32."""
        assert self._weight is not None, "weights come before the first step"
        logits = linear(x.to(self._dtype), self._weight, self._bias)
        return route(logits, self._rule, self._correction)

    def _finish_weight(self, weight: Tensor) -> None:
        self._weight = weight

    def _finish_bias(self, bias: Tensor) -> None:
        self._bias = bias

    def _finish_correction(self, correction: Tensor) -> None:
        self._correction = correction


class PlainWeight(Layer):
    """A weight that no method quantises."""

    def __init__(self, context: LayerContext, shape: tuple[int, ...]) -> None:
        self.values = context.empty(0)
        self.weight = Parameter(shape, lambda: context.empty(*shape), self._finish)

    def _finish(self, weight: Tensor) -> None:
        self.values = weight


class SingleExperts:
    """Each expert is a feed-forward of two linear layers: for CPUs."""

    def __init__(self, context: LayerContext, moe: MoeConfig, hidden_size: int, activation: Activation) -> None:
        self._activation = activation
        self._count = moe.num_experts
        self.members = [_SingleExpert(context, moe, hidden_size) for _ in range(moe.num_experts)]

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """``x [T, E]`` through ``experts [T, K]``, weighed by ``weights [T, K]``: ``[T, E]``."""
        return experts_on_host(x, weights, experts, self._count, self._apply)

    def _apply(self, expert: int, x: Tensor) -> Tensor:
        member = self.members[expert]
        return member.down_proj.forward(self._activation(member.gate_up_proj.forward(x)))


class _SingleExpert(Layer):
    def __init__(self, context: LayerContext, moe: MoeConfig, hidden_size: int) -> None:
        size, bias = moe.inner_size, moe.has_expert_bias
        self.gate_up_proj = Linear(context, hidden_size, {"gate": size, "up": size}, bias=bias)
        self.down_proj = Linear(context, size, hidden_size, bias=bias)


class StackedExperts:
    """All experts in one tensor for each product: for GPUs, and for Triton's interpreter in tests."""

    def __init__(self, context: LayerContext, moe: MoeConfig, hidden_size: int, activation: Activation) -> None:
        if context.quantization.name != "none":
            raise ConfigError(
                f"quantization is {context.quantization.name}, but the experts of this model are multiplied in the "
                "dtype of the model on a GPU: leave quantization out",
                param="quantization",
            )
        self._activation = activation
        count, size, bias = moe.num_experts, moe.inner_size, moe.has_expert_bias
        shards = {"gate": size, "up": size}
        gate_up = _Stack(context, (count, 2 * size, hidden_size), bias, shards)
        down = _Stack(context, (count, hidden_size, size), bias, None)
        self._stacks = (gate_up, down)
        self._tensors: ExpertTensors | None = None
        self.members = [_StackedExpert(gate_up.member(index), down.member(index)) for index in range(count)]

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As ``SingleExperts.forward``; nothing waits for the device."""
        if self._tensors is None:
            gate_up, down = self._stacks
            assert gate_up.weight is not None and down.weight is not None, "weights come before the first step"
            self._tensors = ExpertTensors(gate_up.weight, down.weight, gate_up.bias, down.bias)
        return experts_on_gpu(x, self._tensors, weights, experts, self._activation)


class _StackedExpert(Layer):
    def __init__(self, gate_up_proj: _StackMember, down_proj: _StackMember) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj


class _StackMember(Layer):
    """One expert's rows of a stack, under its own name."""

    def __init__(self, weight: Parameter, bias: Parameter | None) -> None:
        self.weight = weight
        if bias is not None:
            self.bias = bias


class _Stack:
    """One tensor ``[X, N, K]``, and ``[X, N]`` for biases, allocated when the first expert arrives."""

    def __init__(
        self, context: LayerContext, shape: tuple[int, int, int], has_bias: bool, shards: dict[str, int] | None
    ) -> None:
        self._context, self._shape, self._has_bias, self._shards = context, shape, has_bias, shards
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def member(self, index: int) -> _StackMember:
        """The parameters of expert ``index``: views, filled in place."""

        def weight() -> Tensor:
            if self.weight is None:
                self.weight = self._context.empty(*self._shape)
            return self.weight[index]

        def bias() -> Tensor:
            if self.bias is None:
                self.bias = self._context.empty(*self._shape[:2])
            return self.bias[index]

        rows = self._shape[1]
        return _StackMember(
            Parameter(self._shape[1:], weight, _nothing, self._shards),
            Parameter((rows,), bias, _nothing, self._shards) if self._has_bias else None,
        )


def _nothing(_: Tensor) -> None:
    """A view that is filled needs nothing more."""


def _activation(moe: MoeConfig, hidden_act: str) -> Activation:
    if moe.swiglu is not None:
        return Activation("clamped_swiglu", *moe.swiglu)
    if hidden_act not in _KINDS:
        raise ConfigError(
            f"hidden_act {hidden_act!r} is not supported in experts; supported: {', '.join(_KINDS)}",
            param="hidden_act",
        )
    return Activation(_KINDS[hidden_act])

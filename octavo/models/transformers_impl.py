"""Any causal LM by transformers' own code, with our paged attention in place of its own.

All tokens of a step run as one sequence of batch size 1 with their positions; what keeps requests apart is attention
alone, and that is ours. So prefix caching, chunked prefill and sliding-window groups work as for a model of our own.
What the code asks of attention is found by ``transformers_probe.py``, which also says why a model cannot run so;
weights arrive through ``transformers_weights.py``. Needs the ``transformers`` package; the control half never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.batch import ForwardBatch
from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.attention import Attention
from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer, ParameterSlot
from octavo.models.transformers_code import find_recipe
from octavo.models.transformers_probe import PLUG, probe, run_backbone, run_head, split_head
from octavo.models.transformers_weights import collect_slots_of, on_device


class _Step:
    """The batch of the pass at hand: transformers' code has no place for it among its arguments."""

    batch: ForwardBatch | None = None


class PluggedAttention(Layer):
    """Answers the attention calls of one module of transformers' model."""

    def __init__(self, attention: Attention, step: _Step) -> None:
        self.attention = attention
        self._step = step

    def __call__(
        self,
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """``[1, H, T, D]``, twice ``[1, G, T, D]`` to ``[1, T, H, D]``; what else is passed was looked at by the
        probe."""
        batch = self._step.batch
        assert batch is not None, "attention runs within forward()"
        if self.attention.spec.has_sinks:
            self.attention.set_sinks(options["s_aux"].flatten().float())
        q, k, v = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
        return self.attention.attend(q, k, v, batch).unflatten(1, q.shape[1:]).unsqueeze(0)


class TransformersForCausalLM(Layer):
    """See the module."""

    is_recordable = False
    """Recording foreign code as a graph is not tried."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        """Build the model with empty weights.

        Raises:
            ConfigError: transformers does not know the model, or its code cannot run on paged attention; lists why.
        """
        if context.quantization.name != "none":
            raise ConfigError(
                f"quantization is {context.quantization.name}, but a model that runs with transformers' code keeps "
                "plain weights: leave it out or give none",
                param="quantization",
            )
        recipe = find_recipe(config)
        calls = probe(config, recipe)
        with _empty_parameters(), torch.device(context.device):
            self._head = recipe.make(context.dtype)
        self._slots, self.weight_map = collect_slots_of(self._head, on_device(context.device))
        modules = dict(self._head.named_modules())
        self._backbone = split_head(self._head)
        self._step = _Step()
        self.layers: list[PluggedAttention] = []
        for call in calls:
            attention = Attention(
                context,
                call.num_heads,
                call.num_kv_heads,
                call.head_dim,
                scale=call.scale,
                sliding_window=call.sliding_window,
                logit_softcap=call.logit_softcap,
                has_sinks=call.has_sinks,
            )
            plug = PluggedAttention(attention, self._step)
            setattr(modules[call.module], PLUG, plug)
            self.layers.append(plug)

    def slots(self, prefix: str = "") -> dict[str, ParameterSlot]:
        """Under the checkpoint's names."""
        return {prefix + name: slot for name, slot in self._slots.items()}

    def weight_tensors(self) -> Iterator[Tensor]:
        """What the model holds on its device."""
        for module in (self._head, self._backbone):
            yield from module.parameters()
            yield from module.buffers()

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """``[T, E]``; see CausalLM."""
        assert hidden is None, "transformers' code is not cut into stages"
        self._step.batch = batch
        try:
            return run_backbone(self._backbone, batch.input_ids, batch.positions)
        finally:
            self._step.batch = None

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[L, E] -> [L, V]``; see CausalLM."""
        return run_head(self._head, hidden)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Modules made within have parameters without storage, but real buffers, which no checkpoint brings."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is, is being tied: it stays the same object
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

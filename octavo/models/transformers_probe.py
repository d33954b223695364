"""What transformers' code of a model asks of attention, found by running it once without weights or values.

Everything lives on torch's meta device, so a probe costs milliseconds and no memory. Each call of the attention
interface is written down: which module, how many heads, which window, cap and scale. Whatever our paged attention could
not honour is a reason to refuse the model, and all reasons are told at once. Knows no weights and no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from octavo.config.model import ModelConfig
from octavo.models.transformers_code import INTERFACE, Recipe, refusal

PLUG = "octavo_attention"
"""Attribute of a module that says who answers its attention calls."""
PROBE_TOKENS = 5
_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_HARMLESS = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "use_cache", "position_ids",
     "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings"}
)  # fmt: skip
"""Arguments of the attention interface that are honoured, or that change nothing without a cache of transformers'."""


def paged_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function that transformers' models call; hands over to whoever is plugged into the module.

    Args:
        module: The attention module of the model's code.
        query: ``[1, H, T, D]``.
        key: ``[1, G, T, D]``.
        value: ``[1, G, T, D]``.
        attention_mask: None: there is no mask for our name.
        options: What the family passes besides.

    Returns:
        ``[1, T, H, D]``, and no weights.
    """
    return getattr(module, PLUG)(module, query, key, value, attention_mask, options), None


AttentionInterface.register(INTERFACE, paged_attention_forward)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer, as the model's code calls it."""

    module: str
    """Dotted name in the model."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None
    sliding_window: int | None
    logit_softcap: float | None
    has_sinks: bool


class HandedStates(nn.Module):
    """Takes the place of the backbone when logits are wanted: returns the hidden states that it is handed.

    So the head runs with everything that a family does around it (scales, soft-caps, biases).
    """

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _HandedOutput:
        """``[1, L, E]``, in the form that heads expect."""
        return _HandedOutput(inputs_embeds)

    @property
    def decoder(self) -> HandedStates:
        """For heads that reach through their backbone (OPT)."""
        return self


class _HandedOutput:
    """A backbone's output with hidden states only; whatever else a head looks for is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, _name: str) -> None:
        return None


class _Recorder:
    """Answers attention calls with nothing and remembers them."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[AttentionCall] = []
        self.problems: list[str] = []
        self._names = {module: name for name, module in model.named_modules()}
        for module in self._names:
            setattr(module, PLUG, self)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        name = self._names[module]
        if any(call.module == name for call in self.calls):
            self.problems.append("a layer attends twice in one pass")
        if mask is not None:
            self.problems.append("its attention brings a mask of its own")
        if key.shape != value.shape or query.shape[3] != key.shape[3]:
            self.problems.append(f"its keys have {key.shape[3]} dimensions and its values {value.shape[3]}")
        if query.shape[2] != key.shape[2]:
            self.problems.append(f"its attention looks at {key.shape[2]} keys for {query.shape[2]} tokens")
        if options.get("is_causal", getattr(module, "is_causal", True)) is False:
            self.problems.append("its attention is not causal")
        sinks = options.get("s_aux")
        if sinks is not None and sinks.numel() != query.shape[1]:
            self.problems.append(f"its attention has {sinks.numel()} sinks for {query.shape[1]} heads")
        odd = sorted(key for key, value in options.items() if value is not None and key not in _HARMLESS)
        if odd:
            self.problems.append(f"its attention takes {', '.join(odd)}")
        self.calls.append(
            AttentionCall(
                module=name,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=query.shape[3],
                scale=options.get("scaling"),
                sliding_window=options.get("sliding_window"),
                logit_softcap=options.get("softcap"),
                has_sinks=sinks is not None,
            )
        )
        return query.new_empty(query.transpose(1, 2).shape)


def split_head(model: nn.Module) -> nn.Module:
    """Take the backbone out of a causal LM, whose head then runs on hidden states that it is handed."""
    name: str = model.base_model_prefix  # type: ignore[assignment]
    backbone: nn.Module = getattr(model, name)
    setattr(model, name, HandedStates())
    return backbone


def run_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """``[L, E] -> [L, V]`` by what ``split_head`` left."""
    return head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]


def probe(config: ModelConfig, recipe: Recipe) -> list[AttentionCall]:
    """The attention calls of one pass, in order.

    Raises:
        ConfigError: The model cannot run on paged attention; lists why.
    """
    problems = _stated_problems(recipe.config)
    if problems:
        raise refusal(config.architecture, problems)
    calls: list[AttentionCall] = []
    try:
        # Weights of half the size: some operators (grouped products of experts) know nothing else without values.
        with torch.device("meta"), torch.inference_mode():
            model = recipe.make(torch.bfloat16)
            recorder = _Recorder(model)
            problems = _class_problems(model)
            backbone = split_head(model)
            if not problems:
                hidden = run_backbone(
                    backbone,
                    torch.zeros(PROBE_TOKENS, dtype=torch.int64),
                    torch.arange(PROBE_TOKENS, dtype=torch.int64),
                )
                problems = recorder.problems
                calls = recorder.calls
                shape = tuple(run_head(model, hidden).shape)
                if shape[0] != PROBE_TOKENS:
                    problems.append(f"its head makes {shape} of {PROBE_TOKENS} tokens")
    except Exception as error:  # whatever foreign code may raise; it becomes the reason
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError) and INTERFACE in str(error):
            reason = "its attention does not go through transformers' attention interface"
        problems.append(reason if "interface" in reason else f"a trial run failed: {type(error).__name__}: {reason}")
    if not calls and not problems:
        problems.append("its attention does not go through transformers' attention interface")
    if problems:
        raise refusal(config.architecture, list(dict.fromkeys(problems)))
    return calls


def run_backbone(backbone: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
    """``[T]`` ids and positions of all requests, as one sequence, to ``[T, E]`` hidden states."""
    output = backbone(input_ids=input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
    return output.last_hidden_state[0]


def _stated_problems(hf: PretrainedConfig) -> list[str]:
    """What the config says against it."""
    problems: list[str] = []
    if getattr(hf, "is_encoder_decoder", False):
        problems.append("it is an encoder-decoder model")
    kinds = set(getattr(hf, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if kinds:
        problems.append(f"it has layers of the kinds {', '.join(sorted(map(str, kinds)))}")
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    for kind in sorted({str(table.get("rope_type")) for table in tables} & _BATCH_DEPENDENT_ROPE):
        problems.append(f"its {kind} RoPE depends on the longest text of a batch in transformers' code")
    return problems


def _class_problems(model: nn.Module) -> list[str]:
    """What the code says against it."""
    problems: list[str] = []
    if getattr(model, "_is_stateful", False):
        problems.append("it keeps a recurrent state between tokens")
    backbone = getattr(model, model.base_model_prefix)  # type: ignore[arg-type]
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        problems.append("its code takes no position_ids, so requests cannot share a step")
    return problems

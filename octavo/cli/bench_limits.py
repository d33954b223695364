"""How fast a workload could be on a device whose bandwidth and matrix rate were measured: the roofline.

A model that works layer by layer with perfect kernels and no gaps takes, per step, the larger of bytes / bandwidth and
operations / rate for its matrix products, and again for its attention. Products read their weights once a step;
attention reads each sequence's keys and values once; every request decodes from the first step on; activations,
sampling and the host cost nothing. Of a mixture's experts those weights are read that tokens choose, if they choose
evenly: of X experts with k a token, T tokens choose ``X (1 - (1 - k/X)^T)``.
Williams et al., "Roofline", CACM 2009. Knows no engine, and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do."""

    bytes_per_s: float
    flop_per_s: float
    """Of large matrix products in the weights' type."""
    sustained_flop_per_s: float
    """The same over some hundred products back to back, where power limits it."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Ceilings:
        """From the row ``ceilings`` of a result file."""
        return cls(row["copy_TBps"] * 1e12, row["bf16_TFLOPs"] * 1e12, row["bf16_sustained_TFLOPs"] * 1e12)


@dataclass(frozen=True)
class ModelSize:
    """What a step of a model costs at least."""

    linear: int
    """Weights of the layers' matrices, experts excepted."""
    head: int
    """Weights of the output matrix."""
    num_layers: int
    num_heads: int
    head_dim: int
    kv_bytes_per_token: int
    """Of all layers, windows left aside."""
    bytes_per_weight: int
    expert: int = 0
    """Weights of one expert in every layer."""
    num_experts: int = 0
    top_k: int = 0
    num_local_layers: int = 0
    """Layers that see ``window`` tokens only."""
    window: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], bytes_per_weight: int = 2) -> ModelSize:
        """Of a Llama-like ``config.json``: dense or with experts in every layer, every n-th layer global or all."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        per_layer = hidden * heads * size + 2 * hidden * kv_heads * size + heads * size * hidden
        num_experts = config.get("num_experts", 0)
        per_layer += hidden * num_experts if num_experts else 3 * hidden * config["intermediate_size"]
        pattern = config.get("sliding_window_pattern", 0)
        return cls(
            layers * per_layer, config["vocab_size"] * hidden, layers, heads, size,
            2 * layers * kv_heads * size * bytes_per_weight, bytes_per_weight,
            expert=layers * 3 * hidden * config.get("moe_intermediate_size", 0),
            num_experts=num_experts, top_k=config.get("num_experts_per_tok", 0),
            num_local_layers=layers - layers // pattern if pattern else 0,
            window=config["sliding_window"] if pattern else 0,
        )  # fmt: skip

    def experts_read(self, tokens: int) -> float:
        """Experts of a layer that so many tokens choose."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens) if self.num_experts else 0.0

    def seen(self, lengths: Sequence[float]) -> float:
        """Keys that single queries with so many tokens before and at them see, on the average of the layers."""
        share = self.num_local_layers / self.num_layers
        return (1 - share) * sum(lengths) + share * sum(min(length, self.window) for length in lengths)

    def pairs(self, length: int) -> float:
        """Queries times the keys that they see in a prompt, on the average of the layers."""
        whole = length * (length + 1) / 2
        beyond = max(0, length - self.window)
        share = self.num_local_layers / self.num_layers
        return whole - share * beyond * (beyond + 1) / 2


@dataclass(frozen=True)
class Limits:
    """Seconds that no run goes under: work in turn, at the sustained rate; or all bytes and operations at once."""

    in_turn_s: float
    at_once_s: float


def limit_of_run(
    size: ModelSize, prompt_lens: Sequence[int], output_lens: Sequence[int], ceilings: Ceilings, part: str = "all"
) -> Limits:
    """Of requests that are submitted together; ``part`` is ``all``, ``prefill`` or ``decode``."""
    steps: list[tuple[int, int, float, float]] = []  # tokens, tokens with logits, query-key pairs, cache bytes
    if part != "decode":
        pairs = sum(size.pairs(length) for length in prompt_lens)
        steps.append((sum(prompt_lens), len(prompt_lens), pairs, 0))
    if part != "prefill":
        for done in range(1, max(output_lens)):  # the first token comes from prefill
            live = [prompt for prompt, output in zip(prompt_lens, output_lens, strict=True) if output > done]
            context = size.seen([length + done for length in live])
            steps.append((len(live), len(live), context, context * size.kv_bytes_per_token))
    in_turn = total_ops = total_bytes = 0.0
    for tokens, heads, pairs, cache_bytes in steps:
        read = size.linear + size.head + size.expert * size.experts_read(tokens)
        weights = read * size.bytes_per_weight
        products = 2 * (size.linear + size.expert * size.top_k) * tokens + 2 * size.head * heads
        attention = 4 * size.head_dim * size.num_heads * size.num_layers * pairs
        rate, bandwidth = ceilings.sustained_flop_per_s, ceilings.bytes_per_s
        in_turn += max(products / rate, weights / bandwidth) + max(attention / rate, cache_bytes / bandwidth)
        total_ops += products + attention
        total_bytes += weights + cache_bytes
    return Limits(in_turn, max(total_ops / ceilings.flop_per_s, total_bytes / ceilings.bytes_per_s))


def limit_of_decode_step(size: ModelSize, batch_size: int, context: int, ceilings: Ceilings) -> Limits:
    """Of one step of ``batch_size`` requests with ``context`` tokens each."""
    return limit_of_run(size, [context - 1] * batch_size, [2] * batch_size, ceilings, "decode")

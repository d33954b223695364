"""Which experts a token goes to, and how much each of them counts: every router that the supported families have.

Choosing k logits and taking the softmax over those is the same function as taking the softmax over all, choosing k and
scaling them to sum to one; both are ``Routing(k, is_normalised=True)``. Papers: Shazeer et al., "Outrageously Large
Neural Networks", 2017 (top-k); DeepSeek-AI, "DeepSeek-V2" and "DeepSeek-V3", 2024 (groups; sigmoid scores with a
correction that only chooses); Liu et al., "GRIN", 2024 (sparsemixer).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels


class Scoring(enum.Enum):
    """From logits to the scores that are compared and weigh."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SPARSEMIXER = "sparsemixer"
    """Two experts; each weighs by a softmax over the logits that come near it."""


@dataclass(frozen=True, slots=True)
class Routing:
    """A router's rule; hashable, so that it can be a constant of a kernel."""

    top_k: int
    scoring: Scoring = Scoring.SOFTMAX
    is_normalised: bool = False
    """Weights are divided by their sum."""
    scale: float = 1.0
    """Multiplies the weights at the end."""
    num_groups: int = 1
    """Experts are cut into so many groups of neighbours."""
    top_groups: int = 1
    """Groups from which experts are chosen."""
    is_group_of_two: bool = False
    """A group is judged by the sum of its two best scores; else by its best."""
    jitter: float = 0.0
    """Sparsemixer: a logit this far (relative, doubled) below the best is no candidate."""


def route_ref(logits: Tensor, rule: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Experts of each token.

    Args:
        logits: ``[T, X]``, any float dtype.
        rule: The router's.
        correction: ``[X]``, added to scores where they are compared, not where they weigh.

    Returns:
        Weights ``[T, K]`` float32 and experts ``[T, K]`` int32, best first; equal scores in no certain order. A row of
        NaN goes somewhere: expert ids are always in range.
    """
    if rule.scoring is Scoring.SPARSEMIXER:
        return _sparsemixer(logits.float(), rule)
    scores = logits.float()
    scores = scores.softmax(-1) if rule.scoring is Scoring.SOFTMAX else scores.sigmoid()
    choice = scores if correction is None else scores + correction.float()
    if rule.num_groups > 1:
        choice = _limit_to_groups(choice, rule)
    experts = choice.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.is_normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scale, experts.int()


def route(logits: Tensor, rule: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``route_ref``; in one launch on a GPU, lowest expert first among equals. No host synchronisation."""
    if logits.is_cuda and rule.scoring is not Scoring.SPARSEMIXER:
        return gpu_kernels("moe").route(logits, rule, correction)
    return route_ref(logits, rule, correction)


def _limit_to_groups(choice: Tensor, rule: Routing) -> Tensor:
    """Scores outside the best groups become -inf."""
    grouped = choice.unflatten(-1, (rule.num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if rule.is_group_of_two else grouped.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(rule.top_groups, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _sparsemixer(logits: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """One expert after the other: the best logit, weighed among those near it, is then out of the running."""
    left = logits
    weights: list[Tensor] = []
    experts: list[Tensor] = []
    for _ in range(rule.top_k):
        best, expert = left.max(dim=-1, keepdim=True)
        is_far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * rule.jitter
        near = left.masked_fill(is_far, float("-inf")).softmax(-1)
        weights.append(near.gather(-1, expert))
        experts.append(expert)
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, -1) * rule.scale, torch.cat(experts, -1).int()

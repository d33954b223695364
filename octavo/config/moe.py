"""What the mixtures of experts of a model are, as plain data. Read from a config by ``checkpoint/moe.py``; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError

SCORINGS = ("softmax", "sigmoid", "sparsemixer")


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Experts and their router, the same in all layers that have them."""

    num_experts: int
    top_k: int
    """Experts of a token."""
    inner_size: int
    """Feed-forward size of one expert."""
    layers: tuple[bool, ...]
    """[num_layers] whether the layer is a mixture; the others have one dense feed-forward."""
    scoring: str = "softmax"
    """One of SCORINGS: from the router's logits to scores."""
    is_normalised: bool = False
    """The weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Multiplies them at the end."""
    num_groups: int = 1
    top_groups: int = 1
    """Experts are chosen from this many groups of neighbours."""
    is_group_of_two: bool = False
    """A group is judged by its two best scores; else by its best."""
    jitter: float = 0.0
    """Of sparsemixer."""
    has_router_bias: bool = False
    has_correction: bool = False
    """A bias that takes part in choosing and not in weighing."""
    is_wide_router: bool = False
    """The router's logits are computed in float32, whatever the dtype of the model."""
    has_expert_bias: bool = False
    shared_size: int = 0
    """Feed-forward size of what every token goes through besides; 0 = there is none."""
    has_shared_gate: bool = False
    """The shared part is multiplied by a gate of its own."""
    swiglu: tuple[float, float] | None = None
    """Alpha and limit of the clamped activation of gpt-oss; None = ``hidden_act``."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"model config: a token has {self.top_k} experts, but must have between 1 and {self.num_experts}",
                param="num_experts_per_tok",
            )
        if self.scoring not in SCORINGS:
            raise ConfigError(
                f"model config: the router's scoring is {self.scoring!r}, but must be one of {', '.join(SCORINGS)}",
                param="scoring_func",
            )
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(
                f"model config: {self.num_experts} experts in {self.num_groups} groups of which {self.top_groups} are "
                "taken do not fit together",
                param="n_group",
            )
        size = self.num_experts // self.num_groups
        if self.top_groups * size < self.top_k or (self.is_group_of_two and self.num_groups > 1 and size < 2):
            raise ConfigError(
                f"model config: {self.top_groups} groups of {size} experts are too few to choose {self.top_k} from",
                param="topk_group",
            )

"""What the layers of a model store per token, and how that becomes block counts. No torch.

Layers of one kind (same attention window, same shape) form a *group*, or several where another kind has fewer layers;
every group has a block table per request. All
groups share one pool of blocks: tensor ``j`` of the cache serves the j-th layer of each group, and a block id belongs
to one group at a time, so memory moves freely between kinds. That needs equal bytes per block in every group, which
``KVCacheSpec`` checks. Paper: Kwon et al., SOSP 2023, section 4.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from octavo.errors import ConfigError


class KVKind(enum.Enum):
    """How long a token's keys and values are needed."""

    FULL = "full"
    SLIDING_WINDOW = "sliding_window"


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers that share one block table."""

    kind: KVKind
    layer_indices: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    bytes_per_element: int
    sliding_window: int | None = None
    """Tokens that a query may see, itself included; only for SLIDING_WINDOW."""

    def __post_init__(self) -> None:
        if (self.kind is KVKind.SLIDING_WINDOW) != (self.sliding_window is not None):
            raise ConfigError("a sliding-window group needs sliding_window, a full one has none", param="kv_groups")

    @property
    def bytes_per_token_per_layer(self) -> int:
        """Keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_element


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The groups of a model and the size of a block."""

    groups: tuple[KVGroupSpec, ...]
    block_size: int
    """Tokens per block."""

    def __post_init__(self) -> None:
        if len({group.bytes_per_token_per_layer for group in self.groups}) > 1:
            raise ConfigError("all KV groups must store the same bytes per token and layer", param="kv_groups")

    @property
    def num_tensors(self) -> int:
        """Cache tensors to allocate: the layers of the largest group."""
        return max(len(group.layer_indices) for group in self.groups)

    @property
    def bytes_per_block(self) -> int:
        """Memory of one block id over all cache tensors."""
        return self.num_tensors * self.block_size * self.groups[0].bytes_per_token_per_layer

    def blocks_for_tokens(self, num_tokens: int) -> int:
        """Most blocks that one request of this length holds at once, all groups together."""
        total = 0
        for group in self.groups:
            tokens = num_tokens
            if group.sliding_window is not None:
                # The window can straddle one block more than its length in blocks.
                tokens = min(num_tokens, group.sliding_window + self.block_size)
            total += -(-tokens // self.block_size)
        return total

    def describe(self, num_tokens: int) -> str:
        """The groups in words, and what a request of so many tokens holds, beside what it would without windows."""
        words: list[str] = []
        for window in dict.fromkeys(group.sliding_window for group in self.groups):
            kind = [group for group in self.groups if group.sliding_window == window]
            layers = sum(len(group.layer_indices) for group in kind)
            sees = "see everything" if window is None else f"see {window} tokens"
            words.append(f"{layers} layers {sees} ({len(kind)} group{'s' * (len(kind) > 1)})")
        layers = sum(len(group.layer_indices) for group in self.groups)
        held = self.blocks_for_tokens(num_tokens) * self.bytes_per_block / 2**20
        text = f"{', '.join(words)}; a request of {num_tokens} tokens holds {held:.1f} MiB"
        if any(group.sliding_window is not None for group in self.groups):
            plain = layers * -(-num_tokens // self.block_size) * self.bytes_per_block / self.num_tensors / 2**20
            text += f", and would hold {plain:.1f} MiB without windows"
        return text

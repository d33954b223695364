"""ParameterSlot: where one checkpoint tensor (or shard of a fused one) lands in a model.

The loader knows names and files; a slot knows shapes, dtypes and what to do when it is complete (repack, quantise).
That is how loading streams: a linear layer is finished the moment its last shard arrives, not after the whole file.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ParameterSlot(Protocol):
    """One parameter of a model. ``layers`` provide these through ``collect_slots(model) -> dict[name, slot]``."""

    def expected_shape(self, shard: str | None = None) -> tuple[int, ...]:
        """Shape of the whole parameter as checkpoints store it, or of one shard (``q``, ``k``, ``v``, ``gate``,
        ``up``). Raises KeyError for a shard that this parameter does not have."""
        ...

    def load(self, tensor: Tensor, shard: str | None = None, row_start: int = 0) -> None:
        """Copy ``tensor`` (any float dtype; converted) to rows ``row_start...`` of the parameter or shard. Storage is
        allocated at the first call. When the last row has arrived, the owner's ``after_load`` runs once."""
        ...

    def missing(self) -> list[str]:
        """Names of the shards whose rows have not all arrived; ``["weight"]`` for an unsharded one; empty = done."""
        ...

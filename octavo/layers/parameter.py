"""ParameterSlot: where one checkpoint tensor (or shard of a fused one) lands in a model; Parameter is the slot that
all layers use, Layer the node that holds them.

The loader knows names and files; a slot knows shapes, dtypes and what to do when it is complete (repack, quantise).
That is how loading streams: a linear layer is finished the moment its last shard arrives, not after the whole file.
Layers are plain objects, not ``torch.nn.Module``: a step visits hundreds of them, and their call and attribute
machinery costs more than some of the operators. Names follow from the attributes: ``model.layers.0.mlp.down_proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor


class ParameterSlot(Protocol):
    """One parameter of a model. ``layers`` provide these through ``collect_slots(model) -> dict[name, slot]``."""

    def expected_shape(self, shard: str | None = None) -> tuple[int, ...]:
        """Shape of the whole parameter as checkpoints store it, or of one shard (``q``, ``k``, ``v``, ``gate``,
        ``up``). Raises KeyError for a shard that this parameter does not have."""
        ...

    def load(self, tensor: Tensor, shard: str | None = None, row_start: int = 0) -> None:
        """Copy ``tensor`` (any float dtype; converted) to rows ``row_start...`` of the shard, or of the whole
        parameter, whose shards lie one after another. Storage is allocated at the first call. When the last row has
        arrived, the owner's ``after_load`` runs once."""
        ...

    def missing(self) -> list[str]:
        """Names of the shards whose rows have not all arrived; ``["weight"]`` for an unsharded one; empty = done."""
        ...


class Parameter:
    """A ParameterSlot over one tensor whose rows (dimension 0) may be shared out to named shards."""

    def __init__(
        self,
        shape: tuple[int, ...],
        allocate: Callable[[], Tensor],
        complete: Callable[[Tensor], None],
        shards: Mapping[str, int] | None = None,
    ) -> None:
        """Make an empty slot.

        Args:
            shape: Of the whole parameter.
            allocate: Returns the storage, of ``shape``; called at the first ``load``.
            complete: Takes the filled storage over; called once. The slot keeps no reference to it.
            shards: Name to number of rows, in order; None for a parameter that is one checkpoint tensor.
        """
        self._shape = shape
        self._allocate = allocate
        self._complete = complete
        self._storage: Tensor | None = None
        self._starts: dict[str | None, int] = {}
        self._rows: dict[str | None, int] = {}
        self._spans: dict[str | None, list[tuple[int, int]]] = {}
        start = 0
        for name, rows in (shards or {None: shape[0]}).items():
            self._starts[name], self._rows[name], self._spans[name] = start, rows, []
            start += rows
        assert start == shape[0], "shards must add up to the parameter's rows"

    def expected_shape(self, shard: str | None = None) -> tuple[int, ...]:
        """See ParameterSlot."""
        if shard is None:
            return self._shape
        return (self._rows[shard], *self._shape[1:])

    def load(self, tensor: Tensor, shard: str | None = None, row_start: int = 0) -> None:
        """See ParameterSlot.

        Raises:
            KeyError: No such shard.
            ValueError: The rows do not fit, have another width, or were loaded before.
        """
        if shard is None and None not in self._rows:
            self._load_fused(tensor, row_start)
            return
        expected = (self._rows[shard], *self._shape[1:])
        row_end = row_start + tensor.shape[0]
        if tensor.shape[1:] != expected[1:] or row_start < 0 or row_end > expected[0]:
            raise ValueError(f"shape {tuple(tensor.shape)} at row {row_start} does not fit into {expected}")
        spans = self._spans[shard]
        if any(row_start < end and start < row_end for start, end in spans):
            raise ValueError(f"rows {row_start} to {row_end} are already loaded")
        if self._storage is None:
            self._storage = self._allocate()
            assert tuple(self._storage.shape) == self._shape
        offset = self._starts[shard]
        self._storage[offset + row_start : offset + row_end].copy_(tensor)
        spans.append((row_start, row_end))
        if not self.missing():
            storage, self._storage = self._storage, None
            self._complete(storage)

    def _load_fused(self, tensor: Tensor, row_start: int) -> None:
        row_end = row_start + tensor.shape[0]
        if row_start < 0 or row_end > self._shape[0]:
            raise ValueError(f"shape {tuple(tensor.shape)} at row {row_start} does not fit into {self._shape}")
        for name, start in self._starts.items():
            first, last = max(row_start, start), min(row_end, start + self._rows[name])
            if first < last:
                self.load(tensor[first - row_start : last - row_start], name, first - start)

    def missing(self) -> list[str]:
        """See ParameterSlot."""
        return [
            name or "weight"
            for name, rows in self._rows.items()
            if sum(end - start for start, end in self._spans[name]) < rows
        ]


class Layer:
    """A node of the model tree: its Parameters and child layers are its attributes, but for private ones."""

    def slots(self, prefix: str = "") -> dict[str, ParameterSlot]:
        """Parameters below this node under dotted names. A layer that is reached twice keeps its first name."""
        found: dict[str, ParameterSlot] = {}
        _walk(self, prefix, found, set())
        return found


def _walk(node: object, prefix: str, found: dict[str, ParameterSlot], seen: set[int]) -> None:
    if id(node) in seen:
        return
    if isinstance(node, Parameter):
        seen.add(id(node))
        found[prefix] = node
    elif isinstance(node, Layer):
        seen.add(id(node))
        for name, child in vars(node).items():
            if name.startswith("_"):
                continue
            _walk(child, f"{prefix}.{name}" if prefix else name, found, seen)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            _walk(child, f"{prefix}.{index}", found, seen)


def collect_slots(model: object) -> dict[str, ParameterSlot]:
    """Every parameter of a model by name, in the order in which the model defines them.

    Raises:
        TypeError: ``model`` is not a Layer, so nothing would be found.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"{type(model).__name__} is not a Layer: derive models from octavo.layers.parameter.Layer")
    return model.slots()

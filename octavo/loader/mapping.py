"""Apply a model's WeightMap: checkpoint names to parameter slots, shapes checked, nothing missing or left over.

Knows names and shapes only: not file formats (the sources), not storage or repacking (the slots).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.device.device import Device
from octavo.errors import CheckpointError, OctavoError
from octavo.layers.parameter import ParameterSlot
from octavo.loader.source import RowSlice, WeightSource
from octavo.loader.stacks import cut_stack, stack_part
from octavo.models.interface import Stack, WeightMap

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where one checkpoint tensor belongs."""

    slot: ParameterSlot
    shard: str | None
    shape: tuple[int, ...]


class Placement:
    """All checkpoint names that a model takes.

    Args:
        slots: Parameter name to slot, from ``layers.parameter.collect_slots``.
        weight_map: The model's.
    """

    def __init__(self, slots: Mapping[str, ParameterSlot], weight_map: WeightMap) -> None:
        self._slots = slots
        self._map = weight_map
        self._renamed = dict(weight_map.renames)
        self._original = {new: old for old, new in weight_map.renames}

    def find(self, name: str) -> Place | None:
        """The place of checkpoint tensor ``name``; None when the model has no parameter for it."""
        for old, new in self._map.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        parts = [word for part in name.split(".") if (word := self._renamed.get(part, part))]
        name = ".".join(parts)
        for shard in self._map.shards:
            if shard.source in parts:
                target = ".".join(shard.target if part == shard.source else part for part in parts)
                slot = self._slots.get(target)
                if slot is not None:
                    return Place(slot, shard.shard, slot.expected_shape(shard.shard))
        # A fused parameter under its own name: its shards one after another.
        slot = self._slots.get(name)
        return None if slot is None else Place(slot, None, slot.expected_shape())

    def find_stack(self, name: str) -> Stack | None:
        """How checkpoint tensor ``name`` is cut into tensors of single experts; None for what is no such stack."""
        if not self._map.stacks or self.find(name) is not None:
            return None
        for stack in self._map.stacks:
            if name.endswith("." + stack.source) and self.find(stack_part(stack, name, 0, 0)) is not None:
                return stack
        return None

    def is_ignored(self, name: str) -> bool:
        """Whether the model skips this name knowingly."""
        if any(part in name for part in self._map.ignored):
            return True
        is_others = bool(self._map.own) and not name.startswith(self._map.own)
        return is_others and self.find(name) is None and self.find_stack(name) is None

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name to shape of everything that the model needs."""
        result: dict[str, tuple[int, ...]] = {}
        for name, slot in self._slots.items():
            shards = self._shards_of(name, slot)
            for source, shard in shards.items():
                result[self._checkpoint_name(source)] = slot.expected_shape(shard)
            if not shards:
                result[self._checkpoint_name(name)] = slot.expected_shape()
        return result

    def missing(self) -> list[str]:
        """Checkpoint names of which not all rows have arrived."""
        result: list[str] = []
        for name, slot in self._slots.items():
            absent = slot.missing()
            shards = self._shards_of(name, slot)
            names = [source for source, shard in shards.items() if shard in absent] if shards else [name]
            result += [self._checkpoint_name(n) for n in names] if absent else []
        return result

    def _shards_of(self, name: str, slot: ParameterSlot) -> dict[str, str]:
        """Checkpoint names (before prefixes) to shards of a fused parameter; empty for one that is not fused."""
        parts = name.split(".")
        result: dict[str, str] = {}
        for shard in self._map.shards:
            if shard.target not in parts:
                continue
            try:
                slot.expected_shape(shard.shard)
            except KeyError:
                continue
            result[".".join(shard.source if part == shard.target else part for part in parts)] = shard.shard
        return result

    def _checkpoint_name(self, name: str) -> str:
        name = ".".join(self._original.get(part, part) for part in name.split("."))
        for old, new in self._map.prefixes:
            if name.startswith(new):
                return old + name[len(new) :]
        return name


def fill(placement: Placement, source: WeightSource, origin: str, device: Device | None = None) -> int:
    """Stream everything that ``source`` yields into its place.

    Args:
        placement: Where tensors go.
        source: Where they come from.
        origin: File or folder named in errors.
        device: Brings pieces that lie on the host to where the parameters are; None copies them directly.

    Returns:
        Bytes that arrived, as the checkpoint's values count after decoding.

    Raises:
        CheckpointError: A tensor is unexpected, has the wrong shape or type, comes twice, or is missing at the end.
    """

    def wanted(name: str) -> bool:
        if placement.is_ignored(name):
            return False
        if placement.find(name) is None and placement.find_stack(name) is None:
            raise CheckpointError(origin, "the model has no such parameter", tensor=name)
        return True

    num_bytes = 0
    for name, piece in source.tensors(wanted):
        num_bytes += _place(placement, name, piece, origin, device)
    missing = placement.missing()
    if missing:
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise CheckpointError(
            origin, f"lacks {len(missing)} tensors that the model needs: {', '.join(missing[:_MAX_NAMED])}{more}"
        )
    return num_bytes


def _place(placement: Placement, name: str, piece: Tensor | RowSlice, origin: str, device: Device | None = None) -> int:
    place = placement.find(name)
    if place is None:
        stack = placement.find_stack(name)
        if stack is None:
            raise CheckpointError(origin, "the model has no such parameter", tensor=name)
        return _place_stack(placement, stack, name, piece, origin, device)
    shape, start = (piece.full_shape, piece.row_start) if isinstance(piece, RowSlice) else (tuple(piece.shape), 0)
    tensor = piece.tensor if isinstance(piece, RowSlice) else piece
    if shape != place.shape:
        raise CheckpointError(
            origin, f"has shape {list(shape)}, but the model's config asks for {list(place.shape)}", tensor=name
        )
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(origin, f"has type {kind}, but plain weights must be floats", tensor=name)
    if device is not None and tensor.device != device.torch_device:
        tensor = device.upload(tensor)
    try:
        place.slot.load(tensor, place.shard, start)
    except OctavoError:
        raise
    except ValueError as exc:  # rows that were loaded before, or that reach past the end
        raise CheckpointError(origin, str(exc), tensor=name) from exc
    return tensor.nbytes


def _as_it_lies(placement: Placement, stack: Stack, name: str, tensor: Tensor) -> Stack:
    """``stack`` with the order of dimensions that the tensor shows: some families were published in another than the
    one in which their checkpoints are saved today (Qwen3-VL-MoE). Squares lie as ``stack`` says."""
    place = placement.find(stack_part(stack, name, 0, 0))
    if place is None or len(place.shape) != 2 or tensor.dim() != 3:
        return stack
    rows, columns = len(stack.targets) * place.shape[0], place.shape[1]
    orders = {(rows, columns): False, (columns, rows): True} if rows != columns else {}
    return replace(stack, is_transposed=orders.get((tensor.shape[1], tensor.shape[2]), stack.is_transposed))


def _place_stack(
    placement: Placement, stack: Stack, name: str, piece: Tensor | RowSlice, origin: str, device: Device | None
) -> int:
    """Cut the piece and place its parts under their own names; the number of experts is checked here."""
    tensor, start, count = (
        (piece.tensor, piece.row_start, piece.num_rows) if isinstance(piece, RowSlice) else (piece, 0, len(piece))
    )
    if placement.find(stack_part(stack, name, count - 1, 0)) is None or placement.find(
        stack_part(stack, name, count, 0)
    ):
        raise CheckpointError(origin, f"holds {count} experts, but the model's config has another number", tensor=name)
    stack = _as_it_lies(placement, stack, name, tensor)
    if device is not None and tensor.device != device.torch_device:
        tensor = device.upload(tensor)
    num_bytes = 0
    for target, part in cut_stack(stack, name, tensor, start, origin):
        num_bytes += _place(placement, target, part, origin, device)
    return num_bytes

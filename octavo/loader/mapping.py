"""Apply a model's WeightMap: checkpoint names to parameter slots, shapes checked, nothing missing or left over.

Knows names and shapes only: not file formats (the sources), not storage or repacking (the slots).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.device import Device
from octavo.errors import CheckpointError, OctavoError
from octavo.layers.parameter import ParameterSlot
from octavo.loader.source import RowSlice, WeightSource
from octavo.models.interface import WeightMap

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

    def find(self, name: str) -> Place | None:
        """The place of checkpoint tensor ``name``; None when the model has no parameter for it."""
        for old, new in self._map.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        parts = name.split(".")
        for shard in self._map.shards:
            if shard.source in parts:
                target = ".".join(shard.target if part == shard.source else part for part in parts)
                slot = self._slots.get(target)
                if slot is not None:
                    return Place(slot, shard.shard, slot.expected_shape(shard.shard))
        slot = self._slots.get(name)
        # A fused parameter is filled by its shards only; a checkpoint that stores it fused has another layout.
        if slot is None or self._shards_of(name, slot):
            return None
        return Place(slot, None, slot.expected_shape())

    def is_ignored(self, name: str) -> bool:
        """Whether the model skips this name knowingly."""
        return any(part in name for part in self._map.ignored)

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
        if placement.find(name) is None:
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
        raise CheckpointError(origin, "the model has no such parameter", tensor=name)
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

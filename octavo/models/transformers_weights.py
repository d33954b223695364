"""Where checkpoint tensors land in a model of transformers: one slot per tensor, under the checkpoint's own names.

transformers renames and stacks some tensors while it loads (experts of one layer become one tensor); its tables of
these changes are read backwards here, so that the loader streams each tensor to its place. Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from octavo.errors import ConfigError
from octavo.layers.parameter import Parameter, ParameterSlot
from octavo.models.interface import WeightMap

_OLD_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
"""Tables that old checkpoints carry and that the code computes itself."""


@dataclass(slots=True)
class _Target:
    """A parameter or buffer and every module that has it (tied ones have several)."""

    tensor: Tensor
    owners: list[tuple[nn.Module, str]] = field(default_factory=list[tuple[nn.Module, str]])

    def assign(self, value: Tensor) -> None:
        for module, name in self.owners:
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[name] = value


class _NumberSlot:
    """A tensor without dimensions."""

    def __init__(self, target: _Target, allocate: Callable[[Tensor], Tensor]) -> None:
        self._target = target
        self._allocate = allocate
        self._is_loaded = False

    def expected_shape(self, shard: str | None = None) -> tuple[int, ...]:
        """See ParameterSlot."""
        if shard is not None:
            raise KeyError(shard)
        return ()

    def load(self, tensor: Tensor, shard: str | None = None, row_start: int = 0) -> None:
        """See ParameterSlot."""
        if self._is_loaded or row_start or shard is not None:
            raise ValueError("a single number is loaded once and whole")
        self._target.assign(self._allocate(self._target.tensor).copy_(tensor))
        self._is_loaded = True

    def missing(self) -> list[str]:
        """See ParameterSlot."""
        return [] if self._is_loaded else ["weight"]


class _StackedSlot:
    """One tensor's part of a stacked one: expert ``index``, part ``part`` of several along dimension 1."""

    def __init__(self, stack: _Stack, index: int, part: int) -> None:
        self._stack = stack
        self._index = index
        self._part = part
        self._rows = stack.rows_per_part
        self._loaded: list[tuple[int, int]] = []

    def expected_shape(self, shard: str | None = None) -> tuple[int, ...]:
        """See ParameterSlot."""
        if shard is not None:
            raise KeyError(shard)
        return (self._rows, *self._stack.shape[2:])

    def load(self, tensor: Tensor, shard: str | None = None, row_start: int = 0) -> None:
        """See ParameterSlot."""
        del shard
        row_end = row_start + tensor.shape[0]
        if tensor.shape[1:] != self._stack.shape[2:] or row_start < 0 or row_end > self._rows:
            raise ValueError(
                f"shape {tuple(tensor.shape)} at row {row_start} does not fit into {self.expected_shape()}"
            )
        if any(row_start < end and start < row_end for start, end in self._loaded):
            raise ValueError(f"rows {row_start} to {row_end} are already loaded")
        first = self._part * self._rows
        self._stack.storage()[self._index, first + row_start : first + row_end].copy_(tensor)
        self._loaded.append((row_start, row_end))
        if not self.missing():
            self._stack.note_complete()

    def missing(self) -> list[str]:
        """See ParameterSlot."""
        return [] if sum(end - start for start, end in self._loaded) == self._rows else ["weight"]


class _Stack:
    """A parameter ``[X, parts * rows, ...]`` that arrives in ``X * parts`` pieces."""

    def __init__(self, target: _Target, parts: int, allocate: Callable[[Tensor], Tensor]) -> None:
        self.shape = tuple(target.tensor.shape)
        self.rows_per_part = self.shape[1] // parts
        self._target = target
        self._allocate = allocate
        self._storage: Tensor | None = None
        self._num_left = self.shape[0] * parts

    def storage(self) -> Tensor:
        if self._storage is None:
            self._storage = self._allocate(self._target.tensor)
        return self._storage

    def note_complete(self) -> None:
        self._num_left -= 1
        if not self._num_left:
            self._target.assign(self.storage())


def collect_slots_of(
    model: nn.Module, allocate: Callable[[Tensor], Tensor]
) -> tuple[dict[str, ParameterSlot], WeightMap]:
    """A slot for each parameter and stored buffer of a causal LM, and how checkpoint names become slot names.

    Args:
        model: With its backbone in place; parameters on the meta device.
        allocate: Storage for a tensor of that shape and type.

    Raises:
        ConfigError: transformers converts this family's checkpoints in a way that is not supported here.
    """
    targets, aliases = _targets(model)
    backbone = getattr(model, model.base_model_prefix)  # type: ignore[arg-type]
    keys = dict.fromkeys((model.config.model_type, type(model).__name__, type(backbone).__name__))  # type: ignore[union-attr]
    conversions = [each for key in keys for each in get_checkpoint_conversion_mapping(key) or []]
    renamings = [each for each in conversions if type(each) is WeightRenaming]
    converters = [each for each in conversions if type(each) is WeightConverter]
    if len(renamings) + len(converters) < len(conversions):
        raise _unsupported(model, "a conversion of its checkpoints that is neither a renaming nor a stacking")
    slots: dict[str, ParameterSlot] = {}
    for name, target in targets.items():
        converter = next((each for each in converters if name.endswith(_literal(model, each.target_patterns[0]))), None)
        if converter is not None:
            found = _stacked(model, name, target, converter, allocate)
        elif target.tensor.dim() == 0:
            found = {name: _NumberSlot(target, allocate)}
        else:
            found = {name: _whole(target, allocate)}
        for key, slot in found.items():
            slots[_checkpoint_name(model, key, renamings)] = slot
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    own = tuple((f"{part}.", f"{part}.") for part in dict.fromkeys(name.partition(".")[0] for name in slots))
    ignored = [each for each in _OLD_BUFFERS if not any(each in name for name in slots)]
    # A checkpoint of the backbone alone leaves its name out ("wte.weight").
    return slots, WeightMap(prefixes=(*own, ("", f"{prefix}.")), ignored=(*ignored, *aliases))


def _targets(model: nn.Module) -> tuple[dict[str, _Target], list[str]]:
    """Everything that a checkpoint holds under its first name, and the further names of tied tensors."""
    by_id: dict[int, _Target] = {}
    targets: dict[str, _Target] = {}
    aliases: list[str] = []
    for prefix, module in model.named_modules():
        for name, tensor in _stored(module):
            full = f"{prefix}.{name}" if prefix else name
            target = by_id.get(id(tensor))
            if target is None:
                target = by_id[id(tensor)] = targets[full] = _Target(tensor)
            else:
                aliases.append(full)
            target.owners.append((module, name))
    return targets, aliases


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _whole(target: _Target, allocate: Callable[[Tensor], Tensor]) -> Parameter:
    return Parameter(tuple(target.tensor.shape), lambda: allocate(target.tensor), target.assign)


def _stacked(
    model: nn.Module, name: str, target: _Target, converter: WeightConverter, allocate: Callable[[Tensor], Tensor]
) -> dict[str, ParameterSlot]:
    kinds = [type(operation) for operation in converter.operations]
    dims = [vars(operation).get("dim") for operation in converter.operations]
    sources = list(converter.source_patterns)
    stacks, joins = [MergeModulelist], [MergeModulelist, Concatenate]
    is_known = (kinds == stacks and dims == [0] and len(sources) == 1) or (kinds == joins and dims == [0, 1])
    is_known = is_known and all(source.count("*") == 1 for source in sources)
    is_known = is_known and target.tensor.dim() > 1 and target.tensor.shape[1] % len(sources) == 0
    if not is_known:
        raise _unsupported(model, f"{name} is made of {', '.join(sources)} by {[kind.__name__ for kind in kinds]}")
    stack = _Stack(target, len(sources), allocate)
    ending = _literal(model, converter.target_patterns[0])
    stem = name[: len(name) - len(ending)]
    return {
        stem + _literal(model, source).replace("*", str(index)): _StackedSlot(stack, index, part)
        for index in range(stack.shape[0])
        for part, source in enumerate(sources)
    }


def _checkpoint_name(model: nn.Module, name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        source, target = _literal(model, renaming.source_patterns[0]), _literal(model, renaming.target_patterns[0])
        if len(renaming.source_patterns) == 1 and target in name:
            name = name.replace(target, source)
    return name


def _literal(model: nn.Module, pattern: str) -> str:
    """A pattern without any freedom but ``*`` as text."""
    text = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.search(r"[\\()\[\]+?|{}]", text):
        raise _unsupported(model, f"its checkpoint names are found by the pattern {pattern!r}")
    return text


def _unsupported(model: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} cannot be loaded for transformers' code (model_impl transformers): {reason}",
        param="model_impl",
    )


def on_device(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Allocates storage there."""
    return lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

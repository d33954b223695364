"""Cut a checkpoint tensor that holds all experts of a layer into the tensors of single experts, as views."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo.errors import CheckpointError
from octavo.models.interface import Stack


def stack_part(stack: Stack, name: str, expert: int, target: int) -> str:
    """Checkpoint name of one part, if it stood by itself.

    Args:
        stack: Whose ``source`` ends ``name``.
        name: Of the whole tensor.
        expert: Number of the expert.
        target: Index into ``stack.targets``.
    """
    return name.removesuffix(stack.source) + stack.targets[target].format(expert)


def cut_stack(stack: Stack, name: str, tensor: Tensor, first: int, origin: str) -> Iterator[tuple[str, Tensor]]:
    """The parts of some experts with their names.

    Args:
        stack: How the tensor is laid out.
        name: Of the whole tensor.
        tensor: ``[experts, rows, columns]``, or ``[experts, columns, rows]`` where transposed, or ``[experts, rows]``.
        first: Number of the first expert in ``tensor``.
        origin: File named in errors.

    Raises:
        CheckpointError: The rows cannot be shared out among the targets, or the tensor has too few dimensions.
    """
    if tensor.dim() < 2 or (stack.is_transposed and tensor.dim() != 3):
        raise CheckpointError(origin, f"has shape {list(tensor.shape)}, which is no stack of matrices", tensor=name)
    if stack.is_transposed:
        tensor = tensor.transpose(1, 2)
    count, rows = len(stack.targets), tensor.shape[1]
    if rows % count:
        raise CheckpointError(origin, f"has {rows} rows an expert, which {count} parts cannot share", tensor=name)
    size = rows // count
    for index, expert in enumerate(tensor):
        for target in range(count):
            part = expert[target::count] if stack.is_interleaved else expert[target * size : (target + 1) * size]
            yield stack_part(stack, name, first + index, target), part

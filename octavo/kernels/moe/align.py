"""Sort the (token, expert) pairs of a step by expert and cut them into tiles, so that a tile has one expert.

Pair ``t * K + k`` is the k-th expert of token t. Each expert's pairs are padded to whole tiles; how many tiles there
are is known on the device only, so the host launches for the most that there can be.
Paper: Gale et al., "MegaBlocks", 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Pairs in the order of their experts."""

    pairs: Tensor
    """[max_tiles * rows] int32 pair of each row; the number of pairs itself marks padding. Undefined in tiles without
    an expert."""
    experts: Tensor
    """[max_tiles] int32 expert of each tile; -1 = there is nothing in it, nor in those after it."""


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of ``rows`` pairs that ``num_pairs`` can need, whichever experts they have."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // rows


def align_ref(experts: Tensor, num_experts: int, rows: int) -> Tiles:
    """Tiles of the pairs of ``experts [T, K]`` int32; within an expert in the order of their numbers.

    Args:
        experts: ``[T, K]`` int32, each in ``[0, num_experts)``.
        num_experts: X.
        rows: Pairs of a tile.
    """
    flat = experts.flatten().tolist()
    limit = max_tiles(len(flat), num_experts, rows)
    pairs = torch.full((limit * rows,), len(flat), dtype=torch.int32)
    owners = torch.full((limit,), -1, dtype=torch.int32)
    tile = 0
    for expert in range(num_experts):
        mine = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        for first in range(0, len(mine), rows):
            part = mine[first : first + rows]
            pairs[tile * rows : tile * rows + len(part)] = torch.tensor(part, dtype=torch.int32)
            owners[tile] = expert
            tile += 1
    return Tiles(pairs.to(experts.device), owners.to(experts.device))

"""Block tables of every row and KV group on the device, and the cache slots of a step's tokens.

Changes are gathered on the host and written with one operation per group and step. Knows no tokens and no backend.
Paper: Kwon et al., "Efficient memory management for large language model serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.device.device import Device
from octavo.messages import NewRow, SchedulerOutput


class BlockTables:
    """``[rows, width]`` int32 per KV group.

    Attributes:
        width: Most blocks of one row.
        block_size: Tokens per block.
        tables: Per KV group; the last row is the dummy row's.
    """

    def __init__(self, num_groups: int, max_num_seqs: int, max_model_len: int, block_size: int, device: Device) -> None:
        self._device = device
        self.block_size = block_size
        # One more than the length needs: the token drawn when a text is full has a position, but never a slot.
        self.width = _round_up(-(-max_model_len // block_size) + 1)
        self.tables = [device.zeros((max_num_seqs + 1, self.width), torch.int32) for _ in range(num_groups)]
        self._num_blocks = np.zeros((num_groups, max_num_seqs), np.int64)

    def apply(self, plan: SchedulerOutput) -> None:
        """Take over the block ids of new rows, then append those added to rows that were there before."""
        places: list[list[int]] = [[] for _ in self.tables]
        values: list[list[int]] = [[] for _ in self.tables]
        for new in plan.new_rows:
            self._place_new(new, places, values)
        for row, group, block_id in zip(plan.block_rows, plan.block_groups, plan.block_ids, strict=True):
            places[group].append(row * self.width + self._take_column(group, row, 1))
            values[group].append(block_id)
        for table, place, value in zip(self.tables, places, values, strict=True):
            if place:
                index, ids = self._device.upload_all((np.array(place, np.int64), np.array(value, np.int32)))
                table.view(-1).index_copy_(0, index, ids)

    def _place_new(self, new: NewRow, places: list[list[int]], values: list[list[int]]) -> None:
        assert len(new.block_ids) == len(self.tables), "one list of blocks per KV group"
        for group, ids in enumerate(new.block_ids):
            self._num_blocks[group, new.row] = 0
            first = new.row * self.width + self._take_column(group, new.row, len(ids))
            places[group].extend(range(first, first + len(ids)))
            values[group].extend(ids)

    def _take_column(self, group: int, row: int, count: int) -> int:
        column = int(self._num_blocks[group, row])
        assert column + count <= self.width, "more blocks than max_model_len needs"
        self._num_blocks[group, row] = column + count
        return column

    def gather(self, row_index: Tensor, max_seq_len: int) -> list[Tensor]:
        """Per group ``[B, max_blocks]`` int32, wide enough for ``max_seq_len``: the tables of the rows of a step."""
        width = _round_up(-(-max_seq_len // self.block_size))
        return [table[:, :width].index_select(0, row_index) for table in self.tables]

    def slots(self, table_base: Tensor, positions: Tensor) -> list[Tensor]:
        """Per group ``[T]`` int64: where in the cache the tokens of a step go.

        Args:
            table_base: ``[T]`` int64 row of each token times ``width``.
            positions: ``[T]`` int64 position of each token.
        """
        block = torch.div(positions, self.block_size, rounding_mode="floor")
        offset = torch.sub(positions, block, alpha=self.block_size)
        place = block.add_(table_base)
        return [
            torch.add(offset, table.view(-1).index_select(0, place), alpha=self.block_size) for table in self.tables
        ]


def _round_up(width: int) -> int:
    """Kernels are compiled anew for strides that are no multiple of 16."""
    return -(-width // 16) * 16

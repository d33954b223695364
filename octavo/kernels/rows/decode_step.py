"""The two ends of a decode step that never leaves the device: gather its inputs from the rows, commit its tokens.

Shapes are fixed by the number of requests alone, and nothing is read by the host, so both can be captured. Requests
that only fill a batch up point at the dummy row: they have length 0, no slot, and nothing is written for them.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TRITON = "octavo.kernels.rows.triton_decode_step"


@dataclass(slots=True)
class DecodeInputs:
    """What a decode step of B requests reads."""

    input_ids: Tensor
    """[B] int64."""
    positions: Tensor
    """[B] int64."""
    lengths: Tensor
    """[B] int64, tokens known to the cache after the step; 1 for the dummy row."""
    seq_lens: Tensor
    """[B] int32, the same; 0 for the dummy row."""
    slots: list[Tensor]
    """Per KV group [B] int64; -1 for the dummy row."""
    block_tables: list[Tensor]
    """Per KV group [B, max_blocks] int32; entries beyond a request's length are undefined."""


def _triton(tensor: Tensor) -> Any:
    """The Triton kernels where they run on this tensor: on a GPU, or on the CPU in the interpreter; else None."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.import_module(_TRITON)
    return None


def gather_decode(
    row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tables: list[Tensor], dummy_row: int, page: int
) -> DecodeInputs:
    """Inputs of one decode token for each request.

    Args:
        row_index: ``[B]`` int64.
        num_computed: ``[rows]`` int64.
        token_ids: ``[rows, W]`` int32.
        tables: Per KV group ``[rows, max_blocks]`` int32.
        dummy_row: Row of requests that do not exist.
        page: Tokens per block.
    """
    count, device = len(row_index), row_index.device
    long = torch.empty((3, -(-count // 2) * 2), dtype=torch.int64, device=device)
    # Each begins at a multiple of 16 bytes, so that one compiled kernel serves every count.
    out = (long[0, :count], long[1, :count], long[2, :count], torch.empty(count, dtype=torch.int32, device=device))
    slots = [torch.empty(count, dtype=torch.int64, device=device) for _ in tables]
    block_tables = [torch.empty((count, table.shape[1]), dtype=torch.int32, device=device) for table in tables]
    kernels = _triton(row_index) or _Reference
    kernels.gather(row_index, num_computed, token_ids, tables, dummy_row, page, out, slots, block_tables)
    return DecodeInputs(*out, slots, block_tables)


def commit_decode(
    row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tokens: Tensor | None, drawn: Tensor, dummy_row: int
) -> None:
    """Count the token that ran, and write the one that was drawn behind it.

    Args:
        row_index: ``[B]`` int64; only the dummy row may occur twice.
        num_computed: ``[rows]`` int64; written.
        token_ids: ``[rows, W]`` int32; written.
        tokens: ``[B]`` int64, -1 = nothing could be drawn, written as 0; None = drawn elsewhere, later.
        drawn: ``[B]`` int64; gets a copy of ``tokens``.
        dummy_row: Row of requests that do not exist.
    """
    kernels = _triton(row_index) or _Reference
    kernels.commit(row_index, num_computed, token_ids, tokens, drawn, dummy_row)


class _Reference:
    """The same in plain torch."""

    @staticmethod
    def gather(
        row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tables: list[Tensor], dummy_row: int, page: int,
        out: tuple[Tensor, Tensor, Tensor, Tensor], slots: list[Tensor], block_tables: list[Tensor],
    ) -> None:  # fmt: skip
        input_ids, positions, lengths, seq_lens = out
        is_real = row_index != dummy_row
        position = torch.where(is_real, num_computed[row_index], 0)
        input_ids.copy_(torch.where(is_real, token_ids[row_index, position], 0))
        positions.copy_(position)
        lengths.copy_(position + 1)
        seq_lens.copy_(torch.where(is_real, position + 1, 0))
        for table, slot, block_table in zip(tables, slots, block_tables, strict=True):
            block = table[row_index, position // page].long()
            slot.copy_(torch.where(is_real, block * page + position % page, -1))
            block_table.copy_(table[row_index])

    @staticmethod
    def commit(
        row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tokens: Tensor | None, drawn: Tensor, dummy_row: int
    ) -> None:
        is_real = row_index != dummy_row
        rows = row_index[is_real]
        num_computed[rows] += 1
        if tokens is not None:
            drawn.copy_(tokens)
            token_ids[rows, num_computed[rows]] = tokens[is_real].clamp(min=0).int()

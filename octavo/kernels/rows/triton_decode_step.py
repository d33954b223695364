"""Triton kernels of ``decode_step.py``. Imports Triton, so it is imported only where that runs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256


@triton.jit(do_not_specialize=["dummy_row"])
def _gather(
    row_index, num_computed, token_ids, table, input_ids, positions, lengths, seq_lens, slots, block_table,
    history_stride, table_stride, out_stride, dummy_row,
    PAGE: tl.constexpr, IS_FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(row_index + i)
    is_real = row != dummy_row
    position = tl.where(is_real, tl.load(num_computed + row), 0)
    if IS_FIRST:
        token = tl.load(token_ids + row * history_stride + position)
        tl.store(input_ids + i, tl.where(is_real, token, 0).to(tl.int64))
        tl.store(positions + i, position)
        tl.store(lengths + i, position + 1)
        tl.store(seq_lens + i, tl.where(is_real, position + 1, 0).to(tl.int32))
    block = tl.load(table + row * table_stride + position // PAGE).to(tl.int64)
    tl.store(slots + i, tl.where(is_real, block * PAGE + position % PAGE, -1))
    num_blocks = tl.where(is_real, position // PAGE + 1, 0).to(tl.int32)
    for start in range(0, num_blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < num_blocks
        ids = tl.load(table + row * table_stride + columns, mask=mask, other=0)
        tl.store(block_table + i.to(tl.int64) * out_stride + columns, ids, mask=mask)


@triton.jit(do_not_specialize=["num_reqs", "dummy_row"])
def _commit(
    row_index, num_computed, token_ids, tokens, drawn, num_reqs, history_stride, dummy_row,
    HAS_TOKENS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < num_reqs
    row = tl.load(row_index + i, mask=mask, other=0)
    is_real = mask & (row != dummy_row)
    length = tl.load(num_computed + row, mask=is_real, other=0) + 1
    tl.store(num_computed + row, length, mask=is_real)
    if HAS_TOKENS:
        token = tl.load(tokens + i, mask=mask, other=0)
        tl.store(drawn + i, token, mask=mask)
        tl.store(token_ids + row * history_stride + length, tl.maximum(token, 0).to(tl.int32), mask=is_real)


def gather(
    row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tables: list[Tensor], dummy_row: int, page: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor], slots: list[Tensor], block_tables: list[Tensor],
) -> None:  # fmt: skip
    """See ``decode_step.gather_decode``; one launch per KV group."""
    for index, (table, slot, block_table) in enumerate(zip(tables, slots, block_tables, strict=True)):
        _gather[(len(row_index),)](
            row_index, num_computed, token_ids, table, *out, slot, block_table, token_ids.stride(0), table.stride(0),
            block_table.stride(0), dummy_row, page, index == 0, _COLUMNS, num_warps=1,
        )  # fmt: skip


def commit(
    row_index: Tensor, num_computed: Tensor, token_ids: Tensor, tokens: Tensor | None, drawn: Tensor, dummy_row: int
) -> None:
    """See ``decode_step.commit_decode``; one launch."""
    block = 128
    _commit[(triton.cdiv(len(row_index), block),)](
        row_index, num_computed, token_ids, drawn if tokens is None else tokens, drawn, len(row_index),
        token_ids.stride(0), dummy_row, tokens is not None, block, num_warps=4,
    )  # fmt: skip

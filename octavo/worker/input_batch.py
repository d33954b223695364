"""From rows and a plan to the ForwardBatch of a step, without a Python loop over tokens.

What follows from (rows, scheduled tokens) alone is a ``StepLayout`` and is kept for the next step: a run of decode
steps over the same requests only gathers positions, tokens and slots. Reads token values on the device only. Knows no
model; ``model_runner.py`` runs the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.batch import ForwardBatch, StepShape
from octavo.device.device import Device
from octavo.messages import SchedulerOutput
from octavo.worker.block_tables import BlockTables
from octavo.worker.request_rows import RequestRows

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What rows and token counts of a step determine. B requests, T tokens."""

    plan_rows: list[int]
    plan_scheduled: list[int]
    rows: IntArray
    """[B] on the host."""
    scheduled_host: IntArray
    """[B] on the host."""
    last_token: IntArray
    """[B] on the host: place of each request's last token in the step."""
    row_index: Tensor
    """[B] int64."""
    scheduled: Tensor
    """[B] int64."""
    query_start_loc: Tensor
    """[B + 1] int32."""
    token_row: Tensor
    """[T] int64 row of each token."""
    token_offset: Tensor
    """[T] int64 place of each token within its request's part."""
    history_base: Tensor
    """[T] int64 where the row's history begins in the flat one."""
    table_base: Tensor
    """[T] int64 where the row's block table begins in the flat one."""


@dataclass(frozen=True, slots=True)
class SampledSet:
    """Requests of a step that draw a token: those whose part reaches the last known token. L of them."""

    key: bytes
    positions: list[int]
    """[L] batch positions."""
    rows: IntArray
    """[L] on the host."""
    batch_index: Tensor
    """[L] int64, the same as ``positions``."""
    row_index: Tensor
    """[L] int64, the same as ``rows``."""
    logits_indices: Tensor
    """[L] int64 places of their last tokens in the step."""
    history_base: Tensor
    """[L] int64 where their histories begin in the flat one."""
    is_every_request: bool
    is_every_token: bool
    """Each token of the step is one that needs logits, in order: a plain decode step."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step; ``InputBatch.plan_attention`` makes it ready to run."""

    layout: StepLayout
    sampled: SampledSet
    batch: ForwardBatch
    """Without ``metadata``."""
    slots: list[Tensor]
    """Per KV group [T] int64."""
    block_tables: list[Tensor]
    """Per KV group [B, max_blocks] int32."""
    first_positions: IntArray
    """[B] on the host: position of each request's first token in the step."""
    lengths: Tensor
    """[B] int64: tokens known to the cache after the step, so the position of the token to draw."""


class InputBatch:
    """Builds the inputs of steps; keeps the last layout and sampled set."""

    def __init__(
        self, rows: RequestRows, tables: BlockTables, backends: Sequence[AttentionBackend], device: Device
    ) -> None:
        self.rows = rows
        self.tables = tables
        self._backends = backends
        self._device = device
        self._layout: StepLayout | None = None
        self._sampled: SampledSet | None = None

    def build(self, plan: SchedulerOutput, *, is_dry: bool = False) -> StepInputs:
        """Gather the inputs of a step from the rows.

        Args:
            plan: Rows and token counts; its changes of rows and blocks are applied already.
            is_dry: Write no keys and values: every slot is -1. For warming up.
        """
        layout = self.layout_of(plan)
        rows = self.rows
        first = rows.num_computed_host[layout.rows]
        lens_host = first + layout.scheduled_host
        sampled = self.sampled_of(layout, np.flatnonzero(lens_host >= rows.num_tokens_host[layout.rows]))
        lens_list = lens_host.tolist()
        shape = StepShape(
            num_tokens=len(layout.token_row),
            num_reqs=len(lens_list),
            max_query_len=max(layout.plan_scheduled),
            max_seq_len=max(lens_list),
            query_lens=tuple(layout.plan_scheduled),
            seq_lens=tuple(lens_list),
        )
        positions = rows.num_computed.index_select(0, layout.token_row).add_(layout.token_offset)
        input_ids = rows.token_ids.view(-1).index_select(0, layout.history_base + positions).long()
        lengths = rows.num_computed.index_select(0, layout.row_index).add_(layout.scheduled)
        seq_lens = lengths.int()
        slots = self.tables.slots(layout.table_base, positions)
        if is_dry:
            slots = [torch.full_like(slot, -1) for slot in slots]
        tables = self.tables.gather(layout.row_index, shape.max_seq_len)
        batch = ForwardBatch(
            shape=shape,
            input_ids=input_ids,
            positions=positions,
            query_start_loc=layout.query_start_loc,
            seq_lens=seq_lens,
            logits_indices=sampled.logits_indices,
            row_index=layout.row_index,
            metadata=(),
        )
        return StepInputs(layout, sampled, batch, slots, tables, first, lengths)

    def plan_attention(self, inputs: StepInputs) -> ForwardBatch:
        """The batch with what its attention backends prepare for all layers."""
        batch = inputs.batch
        metadata = tuple(
            backend.plan(batch.shape, batch.query_start_loc, batch.seq_lens, table, slots)
            for backend, table, slots in zip(self._backends, inputs.block_tables, inputs.slots, strict=True)
        )
        return replace(batch, metadata=metadata)

    def layout_of(self, plan: SchedulerOutput) -> StepLayout:
        """The last one if it still holds."""
        last = self._layout
        if last is not None and last.plan_rows == plan.rows and last.plan_scheduled == plan.num_scheduled_tokens:
            return last
        rows = np.array(plan.rows, np.int64)
        scheduled = np.array(plan.num_scheduled_tokens, np.int64)
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(scheduled, out=start[1:])
        token_row = np.repeat(rows, scheduled)
        token_offset = np.arange(start[-1]) - np.repeat(start[:-1], scheduled)
        index, counts, loc, token_rows, token_offsets, history_base, table_base = self._device.upload_all(
            (
                rows,
                scheduled,
                start.astype(np.int32),
                token_row,
                token_offset,
                token_row * self.rows.width,
                token_row * self.tables.width,
            )
        )
        self._layout = StepLayout(
            plan_rows=list(plan.rows),
            plan_scheduled=list(plan.num_scheduled_tokens),
            rows=rows,
            scheduled_host=scheduled,
            last_token=start[1:] - 1,
            row_index=index,
            scheduled=counts,
            query_start_loc=loc,
            token_row=token_rows,
            token_offset=token_offsets,
            history_base=history_base,
            table_base=table_base,
        )
        self._sampled = None
        return self._layout

    def sampled_of(self, layout: StepLayout, positions: IntArray) -> SampledSet:
        """The requests at these batch positions draw. Valid for one layout; forgotten with it."""
        key = positions.tobytes()
        last = self._sampled
        if last is not None and last.key == key:
            return last
        indices, rows = layout.last_token[positions], layout.rows[positions]
        batch_index, row_index, logits_indices, history_base = self._device.upload_all(
            (positions, rows, indices, rows * self.rows.width)
        )
        self._sampled = SampledSet(
            key=key,
            positions=positions.tolist(),
            rows=rows,
            batch_index=batch_index,
            row_index=row_index,
            logits_indices=logits_indices,
            history_base=history_base,
            is_every_request=len(positions) == len(layout.rows),
            is_every_token=len(indices) == len(layout.token_row),
        )
        return self._sampled

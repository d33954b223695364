"""One step: apply the plan to the rows, run the model, draw tokens, write them back.

``launch`` runs the model; ``complete`` draws. They are apart because a step whose grammar mask is not known yet is
launched first and completed when the mask arrives. Knows no scheduler and no memory sizes; ``worker.py`` owns both
halves' order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.device.device import Device, Event
from octavo.kernels.sampling.logprobs import token_values_ref
from octavo.messages import NewRow, SchedulerOutput
from octavo.models.interface import CausalLM
from octavo.sampling.row_parameters import resolve_num_top
from octavo.sampling.sampler import Sampler
from octavo.worker.block_tables import BlockTables
from octavo.worker.input_batch import InputBatch, StepInputs
from octavo.worker.outputs import PendingOutput, PromptLogprobs, download_values
from octavo.worker.request_rows import RequestRows

PROMPT_PIECE = 128
"""Prompt positions whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose forward pass is queued and whose tokens are not drawn yet."""

    step_id: int
    inputs: StepInputs
    hidden: Tensor
    """[L, E] of the positions that need logits."""
    prompt_logprobs: list[PromptLogprobs]
    times: tuple[Event, Event]


class ModelRunner:
    """The step of one device."""

    def __init__(
        self,
        model: CausalLM,
        rows: RequestRows,
        tables: BlockTables,
        inputs: InputBatch,
        sampler: Sampler,
        device: Device,
        *,
        vocab_size: int,
        max_logits_rows: int,
    ) -> None:
        """Args:
        model: Loaded, its attention layers bound.
        rows: Token histories.
        tables: Block tables.
        inputs: Builds batches from both.
        sampler: Draws.
        device: Where everything is.
        vocab_size: Columns of the logits.
        max_logits_rows: Rows of logits that may exist at once while drawing.
        """
        self._model = model
        self._rows = rows
        self._tables = tables
        self._inputs = inputs
        self._sampler = sampler
        self._device = device
        self._vocab_size = vocab_size
        self._max_logits_rows = max_logits_rows
        self._prompt_top: dict[int, int] = {}

    def launch(self, plan: SchedulerOutput) -> LaunchedStep:
        """Apply the plan and run the model. The lengths count this step, tokens drawn included, from here on."""
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        self._apply(plan)
        inputs = self._inputs.build(plan)
        layout, sampled = inputs.layout, inputs.sampled
        hidden = self._model.forward(inputs.batch)
        self._rows.advance(layout.rows, layout.row_index, layout.scheduled_host, layout.scheduled)
        self._rows.num_tokens_host[sampled.rows] += 1
        prompts = self._prompt_logprobs(inputs, hidden) if self._prompt_top else []
        # Only the rows that draw are kept: a deferred step must not hold the hidden states of a whole prompt.
        chosen = hidden if sampled.is_every_token else hidden.index_select(0, sampled.logits_indices)
        end.record()
        return LaunchedStep(plan.step_id, inputs, chosen, prompts, (start, end))

    def complete(self, step: LaunchedStep, mask: bytes | None) -> PendingOutput:
        """Draw the step's tokens, write them to the rows and start the copies to the host.

        Args:
            step: From ``launch``; steps are completed in the order of their launches.
            mask: Grammar bits ``[L, ceil(V / 32)]`` int32, or None.
        """
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        inputs, sampled = step.inputs, step.inputs.sampled
        pending = PendingOutput(step.step_id, inputs.batch.shape.num_reqs, self._device, (step.times, (start, end)))
        pending.add_prompt(step.prompt_logprobs)
        bits = self._unpack_mask(mask, len(sampled.rows))
        lengths = inputs.lengths if sampled.is_every_request else inputs.lengths.index_select(0, sampled.batch_index)
        most = self._max_logits_rows
        for first in range(0, len(sampled.rows), most):
            piece = slice(first, first + most)
            output = self._sampler.sample(
                self._model.compute_logits(step.hidden[piece]),
                sampled.rows[piece],
                lengths[piece],
                inputs.batch.shape.max_seq_len,
                None if bits is None else bits[piece],
            )
            self._rows.append(sampled.history_base[piece], lengths[piece], output.token_ids)
            pending.add_sampled(sampled.positions[piece], output)
        end.record()
        return pending

    def warm_up(self, num_tokens: int) -> None:
        """Run a step of this length over row 0 without writing keys and values, and draw greedily."""
        plan = SchedulerOutput(step_id=-1, removed_rows=[], new_rows=[], rows=[0], num_scheduled_tokens=[num_tokens])
        inputs = self._inputs.build(plan, is_dry=True)
        hidden = self._model.forward(inputs.batch)
        self._model.compute_logits(hidden[-1:]).argmax(dim=1)

    def _apply(self, plan: SchedulerOutput) -> None:
        for row in plan.removed_rows:
            self._sampler.remove(row)
            self._prompt_top.pop(row, None)
        if plan.new_rows:
            self._rows.add(plan.new_rows)
            for new in plan.new_rows:
                self._add(new)
        if plan.new_rows or plan.block_rows:
            self._tables.apply(plan)

    def _add(self, new: NewRow) -> None:
        self._sampler.add(new.row, new.sampling, new.token_ids, new.num_prompt_tokens)
        if new.sampling.prompt_logprobs is not None:
            self._prompt_top[new.row] = resolve_num_top(new.sampling.prompt_logprobs, self._vocab_size)

    def _unpack_mask(self, mask: bytes | None, num_sampled: int) -> Tensor | None:
        if mask is None:
            return None
        words = np.frombuffer(mask, np.int32).reshape(num_sampled, -1)
        assert words.shape[1] == -(-self._vocab_size // 32), "one bit per token of the vocabulary"
        return self._device.upload(torch.from_numpy(words.copy()))

    def _prompt_logprobs(self, inputs: StepInputs, hidden: Tensor) -> list[PromptLogprobs]:
        """Logprobs of the prompt tokens behind this step's positions, for the rows that asked; logits in pieces."""
        found: list[PromptLogprobs] = []
        layout = inputs.layout
        for position, row in enumerate(layout.plan_rows):
            num_top = self._prompt_top.get(row)
            if num_top is None:
                continue
            first = int(inputs.first_positions[position])
            last = min(first + layout.plan_scheduled[position], int(self._rows.num_prompt_host[row]) - 1)
            if first >= last:
                continue
            prompt = PromptLogprobs(position, num_top)
            place = int(layout.last_token[position]) + 1 - layout.plan_scheduled[position]
            for start in range(first, last, PROMPT_PIECE):
                end = min(start + PROMPT_PIECE, last)
                logits = self._model.compute_logits(hidden[place + start - first : place + end - first]).float()
                tokens = self._rows.token_ids[row, start + 1 : end + 1].long()
                values = token_values_ref(logits, tokens, num_top, None, self._sampler.is_normalised)
                prompt.pieces.append(download_values(self._device, *values))
            found.append(prompt)
        return found

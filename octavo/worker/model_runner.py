"""One step: apply the plan to the rows, run the model, draw tokens, write them back.

``launch`` runs the model; ``complete`` draws. They are apart because a step whose grammar mask is not known yet is
launched first and completed when the mask arrives. Knows no scheduler and no memory sizes; ``worker.py`` owns both
halves' order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.device.device import Device, Event
from octavo.kernels.sampling.logprobs import token_values_ref
from octavo.messages import NewRow, SchedulerOutput
from octavo.models.interface import CausalLM
from octavo.sampling.row_parameters import resolve_num_top
from octavo.sampling.sampler import Sampler, SamplerOutput
from octavo.worker.cuda_graphs import DecodeGraphs
from octavo.worker.input_batch import InputBatch, SampledSet, StepInputs, StepLayout
from octavo.worker.outputs import PendingOutput, PromptLogprobs, download_values
from octavo.worker.plain_sampling import DrawKind, PlainSampling
from octavo.worker.prompt_graphs import PromptGraphs

PROMPT_PIECE = 128
"""Prompt positions whose logits exist at once."""
OUT_OF_MEMORY_MESSAGE = (
    "the device ran out of memory in a step with this request, the newest of it; others go on. Lower "
    "max_num_batched_tokens or gpu_memory_utilization if it happens again"
)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose forward pass is queued. Exactly one of ``tokens``, ``logits`` and ``hidden`` is there."""

    step_id: int
    num_reqs: int
    """Of the plan."""
    sampled: SampledSet
    lengths: Tensor | None
    """[L] int64 known tokens of the requests that draw; None with ``tokens``."""
    max_seq_len: int
    tokens: Tensor | None
    """[L] int64 when they are drawn and written to the rows already."""
    logits: Tensor | None
    """[L, V]."""
    hidden: Tensor | None
    """[L, E] of the positions that need logits."""
    prompt_logprobs: list[PromptLogprobs]
    times: tuple[Event, Event]
    errors: dict[int, str]
    """Batch position to what went wrong for it alone."""


@dataclass(frozen=True, slots=True)
class Recordings:
    """Steps that are replayed instead of launched."""

    decode: DecodeGraphs | None = None
    """Of one token for each request, draw included."""
    prompts: PromptGraphs | None = None
    """The model's pass over any other step."""


class ModelRunner:
    """The step of one device."""

    def __init__(
        self,
        model: CausalLM,
        inputs: InputBatch,
        sampler: Sampler,
        device: Device,
        *,
        vocab_size: int,
        max_logits_rows: int,
        plain: PlainSampling | None = None,
        recordings: Recordings | None = None,
    ) -> None:
        """Args:
        model: Loaded, its attention layers bound.
        inputs: Builds batches from token histories and block tables, which the runner keeps up to date.
        sampler: Draws.
        device: Where everything is.
        vocab_size: Columns of the logits.
        max_logits_rows: Rows of logits that may exist at once while drawing.
        plain: Draws for requests without special wishes where gathering their parameters would hold up the device.
        recordings: Recorded steps, where launching each kernel by itself would.
        """
        self._model = model
        self._rows = inputs.rows
        self._tables = inputs.tables
        self._inputs = inputs
        self._sampler = sampler
        self._device = device
        self._vocab_size = vocab_size
        self._max_logits_rows = max_logits_rows
        self._plain = plain
        self._recordings = recordings or Recordings()
        self._prompt_top: dict[int, int] = {}

    def apply(self, plan: SchedulerOutput) -> None:
        """Take over the plan's changes of rows and blocks; once per plan, before ``launch``."""
        for row in plan.removed_rows:
            self._sampler.remove(row)
            self._prompt_top.pop(row, None)
        if plan.new_rows:
            self._rows.add(plan.new_rows)
            if self._plain is not None:
                self._plain.add(plan.new_rows)
            for new in plan.new_rows:
                self._add(new)
        if plan.new_rows or plan.block_rows:
            self._tables.apply(plan)

    def launch(self, plan: SchedulerOutput, num_refused: int = 0) -> LaunchedStep:
        """Run the model. The lengths count this step, tokens drawn included, from here on.

        Args:
            plan: Applied.
            num_refused: So many requests at the end of the batch are not run; their rows only keep count, so that
                later plans that still name them do no harm.

        Raises:
            torch.OutOfMemoryError: Nothing has changed; it may be called again.
        """
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        if num_refused:
            return self._launch_part(plan, num_refused, (start, end))
        layout = self._inputs.layout_of(plan)
        step = self._launch_graph(plan, layout, (start, end)) if self._recordings.decode is not None else None
        if step is None:
            step = self._launch_eagerly(plan, (start, end))
        end.record()
        return step

    def _launch_graph(
        self, plan: SchedulerOutput, layout: StepLayout, times: tuple[Event, Event]
    ) -> LaunchedStep | None:
        """As a recorded decode step; None when it is none, or none of that size is recorded."""
        assert self._recordings.decode is not None and self._plain is not None
        if len(layout.last_token) != len(layout.token_row):
            return None
        rows, index = self._rows, layout.rows
        lengths = rows.num_computed_host[index] + 1
        if (lengths < rows.num_tokens_host[index]).any():
            return None  # a chunk of one token: more of the prompt is to come
        kind = DrawKind.OTHER if plan.defer_sampling else self._plain.kind(index)
        result = self._recordings.decode.run(layout, kind)
        if result is None:
            return None
        rows.num_computed_host[index] = lengths
        rows.num_tokens_host[index] += 1
        return LaunchedStep(
            step_id=plan.step_id,
            num_reqs=len(index),
            sampled=self._inputs.sampled_of(layout, np.arange(len(index))),
            lengths=result.lengths,
            max_seq_len=int(lengths.max()),
            tokens=result.tokens,
            logits=result.logits,
            hidden=None,
            prompt_logprobs=[],
            times=times,
            errors={},
        )

    def _launch_eagerly(self, plan: SchedulerOutput, times: tuple[Event, Event]) -> LaunchedStep:
        inputs = self._inputs.build(plan)
        layout, sampled = inputs.layout, inputs.sampled
        hidden = self._forward(inputs)
        self._rows.advance(layout.rows, layout.row_index, layout.scheduled_host, layout.scheduled)
        self._rows.num_tokens_host[sampled.rows] += 1
        prompts = self._prompt_logprobs(inputs, hidden) if self._prompt_top else []
        return LaunchedStep(
            step_id=plan.step_id,
            num_reqs=inputs.batch.shape.num_reqs,
            sampled=sampled,
            lengths=inputs.lengths if sampled.is_every_request else inputs.lengths.index_select(0, sampled.batch_index),
            max_seq_len=inputs.batch.shape.max_seq_len,
            tokens=None,
            logits=None,
            # Only the rows that draw are kept: a deferred step must not hold the hidden states of a whole prompt.
            hidden=hidden if sampled.is_every_token else hidden.index_select(0, sampled.logits_indices),
            prompt_logprobs=prompts,
            times=times,
            errors={},
        )

    def _forward(self, inputs: StepInputs) -> Tensor:
        """``[T, E]``: replayed where such a step is recorded, else launched kernel by kernel."""
        recorded = self._recordings.prompts
        hidden = None if recorded is None else recorded.forward(inputs)
        return self._model.forward(self._inputs.plan_attention(inputs)) if hidden is None else hidden

    def _launch_part(self, plan: SchedulerOutput, num_refused: int, times: tuple[Event, Event]) -> LaunchedStep:
        num_run = len(plan.rows) - num_refused
        if num_run == 0:
            return self._launch_nothing(plan, times)
        part = SchedulerOutput(
            step_id=plan.step_id,
            removed_rows=[],
            new_rows=[],
            rows=plan.rows[:num_run],
            num_scheduled_tokens=plan.num_scheduled_tokens[:num_run],
        )
        step = self._launch_eagerly(part, times)
        self._rows.skip(plan.rows[num_run:], plan.num_scheduled_tokens[num_run:])
        times[1].record()
        errors = dict.fromkeys(range(num_run, len(plan.rows)), OUT_OF_MEMORY_MESSAGE)
        return replace(step, num_reqs=len(plan.rows), errors=errors)

    def _launch_nothing(self, plan: SchedulerOutput, times: tuple[Event, Event]) -> LaunchedStep:
        self._rows.skip(plan.rows, plan.num_scheduled_tokens)
        times[1].record()
        nobody = self._inputs.sampled_of(self._inputs.layout_of(plan), np.zeros(0, np.int64))
        return LaunchedStep(
            step_id=plan.step_id,
            num_reqs=len(plan.rows),
            sampled=nobody,
            lengths=None,
            max_seq_len=0,
            tokens=nobody.row_index,
            logits=None,
            hidden=None,
            prompt_logprobs=[],
            times=times,
            errors=dict.fromkeys(range(len(plan.rows)), OUT_OF_MEMORY_MESSAGE),
        )

    def complete(self, step: LaunchedStep, mask: bytes | None) -> PendingOutput:
        """Draw the step's tokens, write them to the rows and start the copies to the host.

        Args:
            step: From ``launch``; steps are completed in the order of their launches.
            mask: Grammar bits ``[L, ceil(V / 32)]`` int32, or None.
        """
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        pending = PendingOutput(step.step_id, step.num_reqs, self._device, (step.times, (start, end)))
        pending.add_prompt(step.prompt_logprobs)
        pending.add_errors(step.errors)
        if step.tokens is not None:
            pending.add_sampled(step.sampled.positions, SamplerOutput(step.tokens, None, {}))
        else:
            self._draw(step, mask, pending)
        end.record()
        return pending

    def _draw(self, step: LaunchedStep, mask: bytes | None, pending: PendingOutput) -> None:
        sampled, lengths = step.sampled, step.lengths
        assert lengths is not None
        bits = self._unpack_mask(mask, len(sampled.rows))
        kind = DrawKind.OTHER
        if self._plain is not None and bits is None:
            kind = self._plain.kind(sampled.rows)
        most = self._max_logits_rows
        for first in range(0, len(sampled.rows), most):
            piece = slice(first, first + most)
            if step.logits is not None:
                logits = step.logits[piece]
            else:
                assert step.hidden is not None
                logits = self._model.compute_logits(step.hidden[piece])
            if kind is not DrawKind.OTHER:
                assert self._plain is not None
                tokens = self._plain.draw(kind, logits, sampled.row_index[piece], lengths[piece])
                output = SamplerOutput(tokens, None, {})
            else:
                output = self._sampler.sample(
                    logits,
                    sampled.rows[piece],
                    lengths[piece],
                    step.max_seq_len,
                    None if bits is None else bits[piece],
                )
            self._rows.append(sampled.history_base[piece], lengths[piece], output.token_ids)
            pending.add_sampled(sampled.positions[piece], output)

    def warm_up(self, num_tokens: int) -> None:
        """Run a step of this length over row 0 without writing keys and values, and draw in every way."""
        plan = SchedulerOutput(step_id=-1, removed_rows=[], new_rows=[], rows=[0], num_scheduled_tokens=[num_tokens])
        inputs = self._inputs.build(plan, is_dry=True)
        hidden = self._model.forward(self._inputs.plan_attention(inputs))
        logits = self._model.compute_logits(hidden[-1:])
        if self._plain is None:
            logits.argmax(dim=1)
            return
        for kind in (DrawKind.PLAIN, DrawKind.FILTERED):
            self._plain.draw(kind, logits, inputs.layout.row_index, inputs.lengths)

    def first_steps(self) -> list[Callable[[], object]]:
        """What ``record_graphs`` will record."""
        recordings = (self._recordings.decode, self._recordings.prompts)
        return [step for each in recordings if each is not None for step in each.first_steps()]

    def record_graphs(self) -> None:
        """Record the first decode steps and steps with prompts, where there are graphs."""
        if self._recordings.prompts is not None:
            self._recordings.prompts.warm_up()
        if self._recordings.decode is not None:
            self._recordings.decode.warm_up()
            self._device.synchronize()
            self._device.free_unused()

    def record_more(self) -> bool:
        """Record one more step of those that would be recorded at their first use; whether more are left."""
        prompts, decode = self._recordings.prompts, self._recordings.decode
        if prompts is not None and prompts.record_more():
            return True
        return decode is not None and decode.record_more()

    def shrink(self) -> None:
        """Memory was short: take no more for things that only save time."""
        if self._recordings.decode is not None:
            self._recordings.decode.stop_capturing()
        if self._recordings.prompts is not None:
            self._recordings.prompts.stop_recording()

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

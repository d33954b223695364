"""One step of a model that pools: the same rows, batches and plans as for one that generates, and no draws.

Hidden states go to the pooler as they come, so a text may take several steps; the step that has its last token gives
its numbers. Knows no scheduler and no memory sizes. Has the methods of ``ModelRunner`` that the worker calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.config.sections import PoolingConfig
from octavo.device.device import Device, Event
from octavo.layers.pooler import Pooler, activate
from octavo.messages import ModelRunnerOutput, Pooled, ResolvedPooling, SchedulerOutput
from octavo.models.interface import PoolingModel
from octavo.worker.input_batch import InputBatch, SampledSet, StepInputs
from octavo.worker.model_runner import OUT_OF_MEMORY_MESSAGE

NOT_FINITE_MESSAGE = "the model gave NaN or infinity for this text"


@dataclass(slots=True)
class PooledStep:
    """A step whose forward pass is queued."""

    step_id: int
    num_reqs: int
    """Of the plan."""
    done: SampledSet | None
    """Texts whose last token is in the step."""
    values: Tensor | None
    """``[L, E]`` float32 of those."""
    token_rows: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Row to ``[n, E]`` states of its tokens, where each is wanted and all have been computed."""
    times: tuple[Event, Event] | None = None
    errors: dict[int, str] = field(default_factory=dict[int, str])


class PoolingRunner:
    """The step of one device."""

    def __init__(
        self,
        model: PoolingModel,
        inputs: InputBatch,
        device: Device,
        pooling: PoolingConfig,
        *,
        hidden_size: int,
        max_num_seqs: int,
        dtype: torch.dtype,
    ) -> None:
        """Args:
        model: Loaded, its attention layers bound.
        inputs: Builds batches; its rows and tables are kept up to date here.
        device: Where everything is.
        pooling: What becomes of hidden states.
        hidden_size: Of a state.
        max_num_seqs: Rows.
        dtype: Of the model.
        """
        self._model = model
        self._inputs = inputs
        self._device = device
        self._pooling = pooling
        self._dtype = dtype
        self._pooler = Pooler(pooling.pooling_type, max_num_seqs, hidden_size, device.torch_device)
        self._wishes: dict[int, ResolvedPooling] = {}
        self._pieces: dict[int, list[Tensor]] = {}
        """Row to the states of its tokens so far, for rows that want each."""

    def apply(self, plan: SchedulerOutput) -> None:
        """Take over the plan's changes of rows and blocks; once per plan, before ``launch``."""
        for row in plan.removed_rows:
            self._wishes.pop(row, None)
            self._pieces.pop(row, None)
        if plan.new_rows:
            self._inputs.rows.add(plan.new_rows)
            (rows,) = self._device.upload_all((np.array([new.row for new in plan.new_rows], np.int64),))
            self._pooler.reset(rows)
            for new in plan.new_rows:
                assert new.pooling is not None, "every request of an engine that pools says what it wants"
                self._wishes[new.row] = new.pooling
                if new.pooling.per_token:
                    self._pieces[new.row] = []
        if plan.new_rows or plan.block_rows:
            self._inputs.tables.apply(plan)

    def launch(self, plan: SchedulerOutput, num_refused: int = 0) -> PooledStep:
        """Run the model and take in its states.

        Args:
            plan: Applied.
            num_refused: So many requests at the end of the batch are not run; they fail.

        Raises:
            torch.OutOfMemoryError: Nothing has changed; it may be called again.
        """
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        num_run = len(plan.rows) - num_refused
        step = PooledStep(plan.step_id, num_run, None, None)
        if num_run:
            step = self._run(_first_part(plan, num_run))
        if num_refused:
            self._inputs.rows.skip(plan.rows[num_run:], plan.num_scheduled_tokens[num_run:])
            step.errors = dict.fromkeys(range(num_run, len(plan.rows)), OUT_OF_MEMORY_MESSAGE)
        step.num_reqs = len(plan.rows)
        end.record()
        step.times = (start, end)
        return step

    def complete(self, step: PooledStep, mask: bytes | None) -> PendingPooled:
        """Apply heads and activations, and start the copies to the host."""
        assert mask is None, "nothing is drawn"
        start, end = self._device.make_event(), self._device.make_event()
        start.record()
        assert step.times is not None
        pending = PendingPooled(step, (step.times, (start, end)))
        if step.done is not None and step.values is not None:
            self._finish(step.done, step.values, step.token_rows, pending)
        end.record()
        return pending

    def warm_up(self, num_tokens: int) -> None:
        """Run a step of this length over row 0 without writing keys and values."""
        plan = SchedulerOutput(step_id=-1, removed_rows=[], new_rows=[], rows=[0], num_scheduled_tokens=[num_tokens])
        inputs = self._inputs.build(plan, is_dry=True)
        hidden = self._model.forward(self._inputs.plan_attention(inputs))
        if self._pooling.task == "classify":
            self._model.project(hidden[-1:])

    def first_steps(self) -> list[Callable[[], object]]:
        """Nothing is recorded."""
        return []

    def record_more(self) -> bool:
        """Nothing is recorded."""
        return False

    def record_graphs(self) -> None:
        """None: steps of whole texts are long enough to hide their launches."""

    def shrink(self) -> None:
        """Nothing is held that only saves time."""

    def _run(self, plan: SchedulerOutput) -> PooledStep:
        inputs = self._inputs.build(plan)
        layout, done, rows = inputs.layout, inputs.sampled, self._inputs.rows
        batch = self._inputs.plan_attention(inputs)
        hidden = self._model.forward(replace(batch, token_types=self._token_types(inputs)))
        rows.advance(layout.rows, layout.row_index, layout.scheduled_host, layout.scheduled)
        begins = np.flatnonzero(inputs.first_positions == 0)
        first_tokens = layout.last_token[begins] + 1 - layout.scheduled_host[begins]
        first_rows, firsts = self._device.upload_all((layout.rows[begins], first_tokens))
        self._pooler.add(hidden, layout.token_row, first_rows, firsts)
        self._keep_tokens(inputs, hidden)
        if not len(done.rows):
            return PooledStep(plan.step_id, len(layout.rows), None, None)
        lengths = inputs.lengths if done.is_every_request else inputs.lengths.index_select(0, done.batch_index)
        values = self._pooler.finish(hidden, done.row_index, done.logits_indices, lengths)
        finished = {row: torch.cat(self._pieces.pop(row)) for row in done.rows.tolist() if row in self._pieces}
        return PooledStep(plan.step_id, len(layout.rows), done, values, finished)

    def _keep_tokens(self, inputs: StepInputs, hidden: Tensor) -> None:
        if not self._pieces:
            return
        layout = inputs.layout
        for position, row in enumerate(layout.plan_rows):
            pieces = self._pieces.get(row)
            if pieces is not None:
                last = int(layout.last_token[position]) + 1
                pieces.append(hidden[last - layout.plan_scheduled[position] : last].float())

    def _token_types(self, inputs: StepInputs) -> Tensor | None:
        """``[T]``: 1 from where the second text of a pair begins; None where there is no pair."""
        starts = [self._wishes[row].second_text_start for row in inputs.layout.plan_rows]
        if not any(starts):
            return None
        scheduled = inputs.layout.scheduled_host
        # A text alone has its second part beyond any position.
        begins = np.repeat(np.array([start or np.iinfo(np.int64).max for start in starts], np.int64), scheduled)
        (begin,) = self._device.upload_all((begins,))
        return (inputs.batch.positions >= begin).long()

    def _finish(self, done: SampledSet, values: Tensor, token_rows: dict[int, Tensor], pending: PendingPooled) -> None:
        """Heads for all at once; dimensions and activations for all that want the same."""
        if self._pooling.task == "classify":
            values = self._model.project(values.to(self._dtype)).float()
        groups: dict[tuple[int, str], list[int]] = {}
        for index, row in enumerate(done.rows.tolist()):
            wish = self._wishes[row]
            if row in token_rows:
                numbers = _cut(token_rows[row], wish.dimensions)
                pending.add([done.positions[index]], self._device.download(activate(numbers, wish.activation)), True)
            else:
                groups.setdefault((wish.dimensions, wish.activation), []).append(index)
        for (dimensions, activation), indices in groups.items():
            chosen = values
            if len(indices) < len(values):
                (index,) = self._device.upload_all((np.array(indices, np.int64),))
                chosen = values.index_select(0, index)
            result = activate(_cut(chosen, dimensions), activation)
            pending.add([done.positions[index] for index in indices], self._device.download(result), False)


class PendingPooled:
    """A step whose results are being copied; ``result()`` waits for the event alone."""

    def __init__(self, step: PooledStep, times: Sequence[tuple[Event, Event]]) -> None:
        self._step = step
        self._times = times
        self._tables: list[tuple[list[int], Tensor, bool]] = []

    def add(self, positions: list[int], values: Tensor, is_one: bool) -> None:
        """Numbers on their way: a row for each batch position, or a table that belongs to one."""
        self._tables.append((positions, values, is_one))

    def is_ready(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._times[-1][1].query()

    def result(self) -> ModelRunnerOutput:
        """Wait for the copies and make the message."""
        self._times[-1][1].synchronize()
        pooled: list[Pooled | None] = [None] * self._step.num_reqs
        errors = dict(self._step.errors)
        for positions, values, is_one in self._tables:
            table: NDArray[np.float32] = values.numpy()
            parts = [table] if is_one else list(table)
            for position, part in zip(positions, parts, strict=True):
                if np.isfinite(part).all():
                    pooled[position] = Pooled(list(part.shape), part.tobytes())
                else:
                    errors[position] = NOT_FINITE_MESSAGE
        return ModelRunnerOutput(
            step_id=self._step.step_id,
            token_ids=[[] for _ in range(self._step.num_reqs)],
            errors=errors,
            forward_ms=sum(end.elapsed_ms(start) for start, end in self._times),
            pooled=pooled,
        )


def _first_part(plan: SchedulerOutput, num_run: int) -> SchedulerOutput:
    if num_run == len(plan.rows):
        return plan
    return SchedulerOutput(
        step_id=plan.step_id,
        removed_rows=[],
        new_rows=[],
        rows=plan.rows[:num_run],
        num_scheduled_tokens=plan.num_scheduled_tokens[:num_run],
    )


def _cut(values: Tensor, dimensions: int) -> Tensor:
    return values[..., :dimensions] if dimensions else values

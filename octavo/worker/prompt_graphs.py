"""Steps with prompts as graphs: the model's pass over a padded number of tokens, recorded once and replayed.

Launching some hundred kernels one by one takes the host longer than a GPU needs for a small model or a short prompt.
What is recorded is ``model.forward`` over fixed buffers; tokens, lengths and block tables of a step are copied there
first, and tokens that only fill up are written nowhere and belong to no request. Drawing is not recorded. Decode steps
have recordings of their own (``cuda_graphs.py``), which also draw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.batch import ForwardBatch, StepShape
from octavo.device.device import Device, Graph
from octavo.models.interface import CausalLM
from octavo.worker.block_tables import BlockTables
from octavo.worker.input_batch import StepInputs
from octavo.worker.recording import Recorder

logger = logging.getLogger(__name__)

SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
"""Tokens of a step that may be recorded. Where steps are recorded the host is slower than the device, so filling up to
the next size costs less than launching."""
MAX_REQS = 256
"""Requests of a recorded step: each costs a few programs that find nothing to do."""
_WORTH_FLOP = 12e12
"""Beyond this many operations (20 ms of an H200) a step outlasts its launches."""
_AT_START = (16, 64, 1024)
"""Recorded at the start, which also compiles the kernels for few and for many rows; others at their first use."""


def longest_recorded(num_weights: int, max_num_batched_tokens: int) -> int:
    """Most tokens of a recorded step of a model with so many weights; 0: none is worth it."""
    limit = min(_WORTH_FLOP / (2 * max(num_weights, 1)), max_num_batched_tokens)
    if limit < SIZES[0]:
        return 0
    return next((size for size in SIZES if size >= limit), SIZES[-1])


@dataclass(slots=True)
class RecordedStep:
    """One recorded size."""

    graph: Graph | None = None
    hidden: Tensor | None = None
    """[size, E]. Valid until the next graph runs."""


class PromptGraphs:
    """Recorded forward passes of a worker."""

    def __init__(
        self,
        model: CausalLM,
        tables: BlockTables,
        backends: Sequence[AttentionBackend],
        device: Device,
        *,
        max_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """Args:
        model: Loaded and bound.
        tables: For their width; their contents come with each step.
        backends: One per KV group, all capturable.
        device: With graphs.
        max_tokens: From ``longest_recorded``, above 0.
        max_num_seqs: Rows of the engine.
        max_model_len: Longest history.
        """
        self._model = model
        self._backends = backends
        self._device = device
        self._max_model_len = max_model_len
        self._sizes = [size for size in SIZES if size <= max_tokens]
        most, self._max_reqs = self._sizes[-1], min(max_num_seqs, MAX_REQS)
        self._input_ids = device.zeros((most,), torch.int64)
        self._positions = device.zeros((most,), torch.int64)
        self._query_start_loc = device.zeros((self._max_reqs + 1,), torch.int32)
        self._seq_lens = device.zeros((self._max_reqs,), torch.int32)
        self._row_index = device.zeros((self._max_reqs,), torch.int64)
        self._slots = [device.zeros((most,), torch.int64).fill_(-1) for _ in tables.tables]
        self._tables = [device.zeros((self._max_reqs, table.shape[1]), torch.int32) for table in tables.tables]
        self._nothing = device.zeros((0,), torch.int64)
        self._steps: dict[int, RecordedStep] = {}
        self._recorder = Recorder(device)
        self.num_replays = 0
        """Steps that were not launched kernel by kernel."""

    def first_steps(self) -> list[Callable[[], object]]:
        """What ``warm_up`` will record."""
        return [partial(self._forward, size) for size in self._first_sizes()]

    def warm_up(self) -> None:
        """Record the first sizes."""
        for size in self._first_sizes():
            self._record(size)

    def record_more(self) -> bool:
        """Record the largest size that is not; whether there was one."""
        size = next((each for each in reversed(self._sizes) if each not in self._steps), None)
        return size is not None and self._try(size)

    def stop_recording(self) -> None:
        """Record no more: memory is short."""
        self._recorder.stop()

    def forward(self, inputs: StepInputs) -> Tensor | None:
        """``[T, E]`` hidden states, valid until the next graph runs; None where no recorded size fits."""
        shape = inputs.batch.shape
        size = next((each for each in self._sizes if each >= shape.num_tokens), None)
        if size is None or shape.num_reqs > min(size, self._max_reqs):
            return None
        if size not in self._steps and not self._try(size):
            return None
        self._fill(inputs, size)
        step = self._steps[size]
        assert step.graph is not None
        step.graph.replay()
        self.num_replays += 1
        assert step.hidden is not None
        return step.hidden[: shape.num_tokens]

    def _first_sizes(self) -> list[int]:
        """Largest first: the smaller ones then live in its memory."""
        return [size for size in reversed(self._sizes) if size in _AT_START or size == self._sizes[-1]]

    def _try(self, size: int) -> bool:
        return self._recorder.attempt(lambda: self._record(size), f"a step of {size} tokens")

    def _fill(self, inputs: StepInputs, size: int) -> None:
        batch = inputs.batch
        tokens, reqs = batch.shape.num_tokens, batch.shape.num_reqs
        self._input_ids[:tokens].copy_(batch.input_ids)
        self._positions[:tokens].copy_(batch.positions)
        self._query_start_loc[: reqs + 1].copy_(batch.query_start_loc)
        self._query_start_loc[reqs + 1 :].fill_(tokens)
        self._seq_lens[:reqs].copy_(batch.seq_lens)
        self._seq_lens[reqs:].zero_()
        self._row_index[:reqs].copy_(batch.row_index)
        for target, slots in zip(self._slots, inputs.slots, strict=True):
            target[:tokens].copy_(slots)
            target[tokens:size].fill_(-1)
        for target, table in zip(self._tables, inputs.block_tables, strict=True):
            target[:reqs, : table.shape[1]].copy_(table)

    def _record(self, size: int) -> None:
        # While it is recorded and tried no token belongs to a request, so nothing is written.
        self._query_start_loc.zero_()
        self._seq_lens.zero_()
        for slots in self._slots:
            slots.fill_(-1)
        step = RecordedStep()

        def run() -> None:
            step.hidden = self._forward(size)

        step.graph = self._device.capture(run)
        self._steps[size] = step
        logger.debug("recorded a step of %d tokens with prompts", size)

    def _forward(self, size: int) -> Tensor:
        reqs, longest = min(size, self._max_reqs), self._max_model_len
        shape = StepShape(
            num_tokens=size,
            num_reqs=reqs,
            max_query_len=size,
            max_seq_len=longest,
            query_lens=(size,) * reqs,
            seq_lens=(longest,) * reqs,
            is_bound=True,
        )
        query_start_loc, seq_lens = self._query_start_loc[: reqs + 1], self._seq_lens[:reqs]
        batch = ForwardBatch(
            shape=shape,
            input_ids=self._input_ids[:size],
            positions=self._positions[:size],
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            logits_indices=self._nothing,
            row_index=self._row_index[:reqs],
            metadata=tuple(
                backend.plan(shape, query_start_loc, seq_lens, table[:reqs], slots[:size])
                for backend, table, slots in zip(self._backends, self._tables, self._slots, strict=True)
            ),
        )
        return self._model.forward(batch)

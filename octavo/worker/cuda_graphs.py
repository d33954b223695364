"""Decode steps as graphs: gather from the rows, model, head, draw and commit, recorded per batch size and replayed.

What is recorded is a plain function over fixed buffers; a graph is only a faster way to call it, so there is no second
implementation to keep equal. All that differs between two replays lies on the device: the rows of the batch
(``row_index``), their lengths, tokens, block tables and sampling parameters. A batch is filled up to the next recorded
size with the dummy row. A few sizes are recorded at the start, others when they have been wanted a few times.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.batch import ForwardBatch, StepShape
from octavo.device.device import Device, Graph
from octavo.kernels.rows.decode_step import commit_decode, gather_decode
from octavo.models.interface import CausalLM
from octavo.worker.block_tables import BlockTables
from octavo.worker.input_batch import StepLayout
from octavo.worker.plain_sampling import DrawKind, PlainSampling
from octavo.worker.recording import Recorder
from octavo.worker.request_rows import RequestRows

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Batch sizes that may be recorded. A request that only fills up costs a row of the products and reads no keys, so they
may lie far apart. Larger steps are long enough to hide their launches."""
_FIRST = 256
"""Up to here they are recorded at the start."""
_USES_BEFORE_CAPTURE = 3


def make_buckets(limit: int) -> list[int]:
    """Batch sizes that may be recorded for up to ``limit`` requests, rising; at least one."""
    largest = min(limit, BUCKETS[-1])
    return [size for size in BUCKETS if size < largest] + [largest]


@dataclass(slots=True)
class DecodeGraph:
    """One recorded size and kind."""

    graph: Graph
    logits: Tensor | None
    """[size, V], only for ``DrawKind.OTHER``. Valid until the next graph runs."""
    lengths: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What a replay left on the device for the first B requests of its batch."""

    tokens: Tensor | None
    """[B] int64, written to the rows already; None when the sampler has to draw."""
    logits: Tensor | None
    """[B, V] when it has to."""
    lengths: Tensor | None
    """[B] int64 known tokens, with ``logits``."""


class DecodeGraphs:
    """All recorded decode steps of a worker."""

    def __init__(
        self,
        model: CausalLM,
        rows: RequestRows,
        tables: BlockTables,
        backends: Sequence[AttentionBackend],
        sampling: PlainSampling,
        device: Device,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._rows = rows
        self._tables = tables
        self._backends = backends
        self._sampling = sampling
        self._device = device
        self._max_model_len = max_model_len
        self._buckets = make_buckets(max_num_seqs)
        most = self._buckets[-1]
        self._row_index = device.zeros((most,), torch.int64).fill_(rows.dummy_row)
        self._drawn = device.zeros((most,), torch.int64)
        self._order = torch.arange(most, device=device.torch_device)
        self._query_start_loc = torch.arange(most + 1, dtype=torch.int32, device=device.torch_device)
        self._graphs: dict[tuple[DrawKind, int], DecodeGraph] = {}
        self._uses: Counter[tuple[DrawKind, int]] = Counter()
        self._shown: tuple[StepLayout, int] | None = None
        self._recorder = Recorder(device)

    def first_steps(self) -> list[Callable[[], object]]:
        """What ``warm_up`` will record."""
        return [partial(self._step, DrawKind.PLAIN, size) for size in self._first_sizes()]

    def warm_up(self) -> None:
        """Record the first sizes."""
        for size in self._first_sizes():
            self._capture(DrawKind.PLAIN, size)

    def record_more(self) -> bool:
        """Record the largest size that is not, for plain draws; whether there was one."""
        size = next((each for each in reversed(self._buckets) if (DrawKind.PLAIN, each) not in self._graphs), None)
        return size is not None and self._try(DrawKind.PLAIN, size)

    def run(self, layout: StepLayout, kind: DrawKind) -> DecodeResult | None:
        """Run a step of single tokens; None when no recorded size fits."""
        count = len(layout.rows)
        size = self._size_for(kind, count)
        if size is None:
            return None
        if self._shown is None or self._shown[0] is not layout or self._shown[1] != size:
            index = np.full(size, self._rows.dummy_row, np.int64)
            index[:count] = layout.rows
            self._device.write(self._row_index[:size], torch.from_numpy(index))
            self._shown = (layout, size)
        step = self._graphs[kind, size]
        step.graph.replay()
        if kind is not DrawKind.OTHER:
            return DecodeResult(self._drawn[:count], None, None)
        assert step.logits is not None and step.lengths is not None
        return DecodeResult(None, step.logits[:count], step.lengths[:count])

    def stop_capturing(self) -> None:
        """Record no more: memory is short."""
        self._recorder.stop()

    def _first_sizes(self) -> list[int]:
        """Largest first: the smaller ones then live in its memory."""
        return [size for size in reversed(self._buckets) if size <= _FIRST]

    def _size_for(self, kind: DrawKind, count: int) -> int | None:
        if count > self._buckets[-1]:
            return None
        best = next(size for size in self._buckets if size >= count)
        if (kind, best) in self._graphs:
            return best
        self._uses[kind, best] += 1
        if self._uses[kind, best] >= _USES_BEFORE_CAPTURE and self._try(kind, best):
            return best
        larger = [size for other, size in self._graphs if other is kind and size >= count]
        return min(larger, default=None)

    def _try(self, kind: DrawKind, size: int) -> bool:
        return self._recorder.attempt(lambda: self._capture(kind, size), f"a decode step of {size} requests")

    def _capture(self, kind: DrawKind, size: int) -> None:
        # While it is recorded and tried, every request is the dummy one: no row changes.
        self._shown = None
        self._row_index.fill_(self._rows.dummy_row)
        step = DecodeGraph(_NOTHING, None, None)

        def run() -> None:
            step.logits, step.lengths = self._step(kind, size)

        step.graph = self._device.capture(run)
        if kind is not DrawKind.OTHER:
            step.logits = step.lengths = None  # let later graphs have their memory
        self._graphs[kind, size] = step
        logger.debug("recorded a decode step of %d requests (%s)", size, kind.name.lower())

    def _step(self, kind: DrawKind, size: int) -> tuple[Tensor, Tensor]:
        rows, tables = self._rows, self._tables
        row_index, query_start_loc = self._row_index[:size], self._query_start_loc[: size + 1]
        inputs = gather_decode(
            row_index, rows.num_computed, rows.token_ids, tables.tables, rows.dummy_row, tables.block_size
        )
        longest = self._max_model_len
        shape = StepShape(
            num_tokens=size,
            num_reqs=size,
            max_query_len=1,
            max_seq_len=longest,
            query_lens=(1,) * size,
            seq_lens=(longest,) * size,
        )
        batch = ForwardBatch(
            shape=shape,
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            query_start_loc=query_start_loc,
            seq_lens=inputs.seq_lens,
            logits_indices=self._order[:size],
            row_index=row_index,
            metadata=tuple(
                backend.plan(shape, query_start_loc, inputs.seq_lens, table, slots)
                for backend, table, slots in zip(self._backends, inputs.block_tables, inputs.slots, strict=True)
            ),
        )
        logits = self._model.compute_logits(self._model.forward(batch))
        tokens = None
        if kind is not DrawKind.OTHER:
            tokens = self._sampling.draw(kind, logits, row_index, inputs.lengths)
        commit_decode(row_index, rows.num_computed, rows.token_ids, tokens, self._drawn[:size], rows.dummy_row)
        return logits, inputs.lengths


class _Nothing:
    """Stands where a graph is about to be."""

    def replay(self) -> None:
        raise AssertionError("not recorded yet")


_NOTHING = _Nothing()

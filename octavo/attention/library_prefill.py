"""Attention on a GPU with prompts computed by a library: pages are gathered for it; decode is our own kernel.

What ``FLASH_ATTN`` and ``XFORMERS`` share. Requests with one query go the way of ``TRITON_ATTN``, so decode steps can
be recorded. Prompts without history hand their new keys over as they are. Knows no request and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.attention.libraries import Attend, Lengths
from octavo.attention.triton import TritonBackend, TritonMetadata
from octavo.batch import AttentionMetadata, StepShape
from octavo.kernels.attention.gather import gather_pages

_MAX_GATHERED = 1 << 15
"""Tokens gathered for one call, unless one request has more: 128 MiB for 8 heads of 128 in 16 bits."""


@dataclass(slots=True)
class LibraryRun:
    """Requests side by side in the step that one call of the library computes."""

    first: int
    last: int
    """Tokens of the step."""
    lengths: Lengths
    pages: Tensor | None
    """[n, 4] for ``gather_pages``; None when all keys are this step's."""


@dataclass(slots=True)
class LibraryMetadata(TritonMetadata):
    """What all layers of a step share."""

    runs: list[LibraryRun]


class LibraryPrefillBackend(TritonBackend):
    """A TritonBackend whose prompts go to ``library``, which subclasses set."""

    is_capturable: ClassVar[bool] = True
    copies_history: ClassVar[bool] = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._library: Attend = self._load(spec)

    def _load(self, spec: AttentionSpec) -> Attend:
        """The library's function."""
        raise NotImplementedError

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> LibraryMetadata:
        """See AttentionBackend."""
        if step.is_bound:
            # A library wants lengths from the host, so a recorded step takes the kernels that read them on the device.
            planned = super().plan(step, query_start_loc, seq_lens, block_table, slot_mapping)
            return LibraryMetadata(slot_mapping, block_table, planned.work, planned.tiles, None, [])
        decodes_only = replace(step, max_query_len=1) if step.max_query_len > 1 else step
        planned = super().plan(decodes_only, query_start_loc, seq_lens, block_table, slot_mapping)
        runs = list(self._runs(step, slot_mapping.device)) if step.max_query_len > 1 else []
        return LibraryMetadata(slot_mapping, block_table, planned.work, None, planned.few, runs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See AttentionBackend."""
        assert isinstance(meta, LibraryMetadata)
        assert sinks is None, "the libraries' unsupported() refuses sinks"
        super().attend(q, k, v, cache, meta, out)
        for run in meta.runs:
            if run.pages is None:
                keys, values = k[run.first : run.last], v[run.first : run.last]
            else:
                num_keys = sum(run.lengths.key_lens)
                keys, values = gather_pages(cache, meta.block_table, run.pages, num_keys, q.dtype)
            out[run.first : run.last] = self._library(q[run.first : run.last], keys, values, run.lengths)

    def _runs(self, step: StepShape, device: torch.device) -> Iterator[LibraryRun]:
        """Neighbouring prompts together, as long as all have a history or none has, and they fit the buffer."""
        start, rows, first = 0, list[int](), 0
        for row, count in enumerate(step.query_lens):
            if rows and not self._joins(step, rows, row):
                yield self._run(step, rows, first, start, device)
                rows = []
            if count > 1:
                first = first if rows else start
                rows.append(row)
            start += count
        if rows:
            yield self._run(step, rows, first, start, device)

    @staticmethod
    def _joins(step: StepShape, rows: Sequence[int], row: int) -> bool:
        if step.query_lens[row] == 1:
            return False
        is_fresh = [step.query_lens[each] == step.seq_lens[each] for each in (rows[0], row)]
        total = sum(step.seq_lens[each] for each in (*rows, row))
        return is_fresh[0] == is_fresh[1] and (is_fresh[0] or total <= _MAX_GATHERED)

    def _run(self, step: StepShape, rows: Sequence[int], first: int, last: int, device: torch.device) -> LibraryRun:
        page = self._spec.block_size
        queries, keys = [step.query_lens[row] for row in rows], [step.seq_lens[row] for row in rows]
        starts = np.zeros((2, len(rows) + 1), np.int32)
        np.cumsum([queries, keys], axis=1, out=starts[:, 1:])
        query_starts, key_starts = _upload(starts, device)
        lengths = Lengths(query_starts, key_starts, tuple(queries), tuple(keys))
        if queries == keys:
            return LibraryRun(first, last, lengths, None)
        pages = [
            (row, column, int(starts[1, index]) + column * page, min(page, length - column * page))
            for index, (row, length) in enumerate(zip(rows, keys, strict=True))
            for column in range(-(-length // page))
        ]
        return LibraryRun(first, last, lengths, _upload(np.array(pages, np.int32), device))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

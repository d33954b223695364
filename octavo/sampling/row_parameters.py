"""Sampling parameters of every row, as columns; and ``SamplingBatch``, what the sampler needs for one set of rows.

Columns are gathered only when the rows of the batch change; a feature that no row of the batch uses is None in the
batch and costs nothing. Knows no logits: ``sampler.py`` applies the batch, ``builtin.py`` the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.sampling.draw import mix_seed
from octavo.kernels.sampling.filters import FilterColumns
from octavo.kernels.sampling.rows import RowColumns, has_row_kernels
from octavo.messages import ResolvedSampling

IntArray = NDArray[np.int64]

_COLUMNS: dict[str, type[np.generic]] = {
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "repetition_penalty": np.float32,
}


@dataclass(frozen=True, slots=True)
class Filters:
    """min-p, top-k and top-p of the random rows that have any."""

    index: Tensor | None
    """[F] which of the random rows; None = all of them."""
    others: Tensor | None
    """The random rows without a filter; None = there are none."""
    columns: FilterColumns


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with any penalty."""

    index: Tensor
    """[Q] batch positions."""
    rows: Tensor
    first_position: int
    """History before this matters to none of them."""
    num_prompt: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class Entries:
    """Things that name one token each, of all rows of the batch behind one another."""

    position: Tensor
    """[M] int64 batch position."""
    token: Tensor
    """[M] int64."""
    value: Tensor
    """[M] a number that belongs to the entry: a bias, a length."""


@dataclass(frozen=True, slots=True)
class BadWords:
    """Sequences whose last token is ruled out where the output ends in the others."""

    entries: Entries
    """``value`` = number of tokens before the last."""
    prefix: Tensor
    """[M, S] int64, right-aligned."""
    row: Tensor
    """[M] int64."""
    num_prompt: Tensor
    """[M] int64: a word counts only where all of it is output."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """Rows with a thinking budget."""

    index: Tensor
    rows: Tensor
    budget: Tensor
    start_token: Tensor
    end_token: Tensor


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """Rows that want logprobs of what they draw."""

    index: Tensor
    """[W] batch positions."""
    positions: list[int]
    """The same on the host."""
    num_top: list[int]
    """[W], -1 resolved to the vocabulary."""
    named: Tensor | None
    """[W, M] int64, padded with 0."""
    num_named: list[int]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """One set of L rows, in batch order."""

    rows: Tensor
    """[L] int64."""
    num_prompt: Tensor
    """[L] int64."""
    random_index: Tensor | None
    """[R] batch positions that are drawn; None = every one. Empty = all greedy."""
    num_random: int
    temperature: Tensor
    """[R, 1] float32."""
    stream: Tensor
    """[R] int64, see ``kernels/sampling/draw.py``."""
    filters: Filters | None
    columns: RowColumns | None
    """What ``draw_rows`` needs, one entry for each batch position; None where it is not used."""
    penalties: Penalties | None
    allowed: Entries | None
    restricted: Tensor | None
    """Batch positions of ``allowed``."""
    bias: Entries | None
    min_tokens: Entries | None
    bad_words: BadWords | None
    thinking: Thinking | None
    logprobs: LogprobRequest | None


class RowParameters:
    """Columns of numbers, and the parameters themselves for what is not a number. One writer: the sampler."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros(max_num_seqs, dtype) for name, dtype in _COLUMNS.items()
        }
        self._stream = np.zeros(max_num_seqs, np.int64)
        self._num_prompt = np.zeros(max_num_seqs, np.int64)
        self._sampling: dict[int, ResolvedSampling] = {}

    def add(self, row: int, sampling: ResolvedSampling, num_prompt_tokens: int) -> None:
        """A request takes the row."""
        for name, column in self._columns.items():
            column[row] = getattr(sampling, name)
        self._columns["top_k"][row] = min(sampling.top_k, self._vocab_size) % self._vocab_size
        self._stream[row] = mix_seed(sampling.seed)
        self._num_prompt[row] = num_prompt_tokens
        self._sampling[row] = sampling

    def remove(self, row: int) -> None:
        """The row is free again."""
        del self._sampling[row]

    def gather(self, rows: IntArray) -> SamplingBatch:
        """The batch of these rows."""
        samplings = [self._sampling[row] for row in rows.tolist()]
        temperature = self._columns["temperature"][rows]
        random_index = np.flatnonzero(temperature > 0)
        is_all_random = len(random_index) == len(rows)
        allowed = self._entries([(s.allowed_token_ids, None) for s in samplings])
        return SamplingBatch(
            rows=self._upload(rows),
            num_prompt=self._upload(self._num_prompt[rows]),
            random_index=None if is_all_random else self._upload(random_index),
            num_random=len(random_index),
            temperature=self._upload(temperature[random_index, None]),
            stream=self._upload(self._stream[rows[random_index]]),
            filters=self._filters(rows[random_index]),
            columns=self._row_columns(rows) if has_row_kernels(self._device) else None,
            penalties=self._penalties(rows),
            allowed=allowed,
            restricted=None if allowed is None else torch.unique(allowed.position),
            bias=self._entries([(list(s.logit_bias), list(s.logit_bias.values())) for s in samplings], np.float32),
            min_tokens=self._min_tokens(rows, samplings),
            bad_words=self._bad_words(rows, samplings),
            thinking=self._thinking(rows, samplings),
            logprobs=self._logprobs(samplings),
        )

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def _row_columns(self, rows: IntArray) -> RowColumns:
        with np.errstate(divide="ignore"):
            log_min_p = np.log(self._columns["min_p"][rows])
        return RowColumns(
            temperature=self._upload(self._columns["temperature"][rows]),
            stream=self._upload(self._stream[rows]),
            num_prompt=self._upload(self._num_prompt[rows]),
            log_min_p=self._upload(log_min_p),
            top_k=self._upload(self._columns["top_k"][rows]),
            top_p=self._upload(self._columns["top_p"][rows]),
        )

    def _filters(self, rows: IntArray) -> Filters | None:
        top_k, top_p, min_p = (self._columns[name][rows] for name in ("top_k", "top_p", "min_p"))
        index = np.flatnonzero((top_k > 0) | (top_p < 1) | (min_p > 0))
        if len(index) == 0:
            return None
        top_k, top_p, min_p = top_k[index], top_p[index], min_p[index]
        with np.errstate(divide="ignore"):
            log_min_p = np.log(min_p)
        max_top_k = int(top_k.max())
        is_all = len(index) == len(rows)
        columns = FilterColumns(
            log_min_p=self._upload(log_min_p) if min_p.any() else None,
            top_k=self._upload(top_k) if max_top_k else None,
            max_top_k=max_top_k,
            top_p=self._upload(top_p) if (top_p < 1).any() else None,
        )
        return Filters(
            index=None if is_all else self._upload(index),
            others=None if is_all else self._upload(np.setdiff1d(np.arange(len(rows)), index)),
            columns=columns,
        )

    def _penalties(self, rows: IntArray) -> Penalties | None:
        repetition = self._columns["repetition_penalty"][rows]
        presence = self._columns["presence_penalty"][rows]
        frequency = self._columns["frequency_penalty"][rows]
        index = np.flatnonzero((repetition != 1) | (presence != 0) | (frequency != 0))
        if len(index) == 0:
            return None
        num_prompt = self._num_prompt[rows[index]]
        return Penalties(
            index=self._upload(index),
            rows=self._upload(rows[index]),
            first_position=int(np.where(repetition[index] != 1, 0, num_prompt).min()),
            num_prompt=self._upload(num_prompt),
            repetition=self._upload(repetition[index]),
            presence=self._upload(presence[index]),
            frequency=self._upload(frequency[index]),
        )

    def _entries(
        self, per_position: list[tuple[list[int], Sequence[float] | None]], dtype: type[np.generic] = np.int64
    ) -> Entries | None:
        """Join lists of ``(token ids, values or None)``, one per batch position."""
        counts = [len(ids) for ids, _ in per_position]
        if not any(counts):
            return None
        token = np.concatenate([np.asarray(ids, np.int64) for ids, _ in per_position])
        value = np.concatenate(
            [np.asarray(vs if vs is not None else [0] * len(ids), dtype) for ids, vs in per_position]
        )
        return Entries(
            position=self._upload(np.repeat(np.arange(len(counts)), counts)),
            token=self._upload(token),
            value=self._upload(value),
        )

    def _min_tokens(self, rows: IntArray, samplings: list[ResolvedSampling]) -> Entries | None:
        """End tokens, each with the length of text below which it is ruled out."""
        per_position: list[tuple[list[int], Sequence[float] | None]] = []
        for row, sampling in zip(rows.tolist(), samplings, strict=True):
            ids = [*sampling.eos_token_ids, *sampling.stop_token_ids] if sampling.min_tokens > 0 else []
            per_position.append((ids, [int(self._num_prompt[row]) + sampling.min_tokens] * len(ids)))
        return self._entries(per_position)

    def _bad_words(self, rows: IntArray, samplings: list[ResolvedSampling]) -> BadWords | None:
        words = [(i, word) for i, s in enumerate(samplings) for word in s.bad_words_token_ids if word]
        if not words:
            return None
        width = max(1, max(len(word) - 1 for _, word in words))
        prefix = np.zeros((len(words), width), np.int64)
        for entry, (_, word) in enumerate(words):
            prefix[entry, width - len(word) + 1 :] = word[:-1]
        position = np.array([i for i, _ in words], np.int64)
        entries = Entries(
            position=self._upload(position),
            token=self._upload(np.array([word[-1] for _, word in words], np.int64)),
            value=self._upload(np.array([len(word) - 1 for _, word in words], np.int64)),
        )
        return BadWords(
            entries=entries,
            prefix=self._upload(prefix),
            row=self._upload(rows[position]),
            num_prompt=self._upload(self._num_prompt[rows[position]]),
        )

    def _thinking(self, rows: IntArray, samplings: list[ResolvedSampling]) -> Thinking | None:
        index = [i for i, s in enumerate(samplings) if has_thinking_budget(s)]
        if not index:
            return None
        limited = [samplings[i] for i in index]
        budget = [s.thinking_token_budget or 0 for s in limited]
        return Thinking(
            index=self._upload(np.array(index, np.int64)),
            rows=self._upload(rows[index]),
            budget=self._upload(np.array(budget, np.int64)),
            start_token=self._upload(np.array([s.think_start_token_id for s in limited], np.int64)),
            end_token=self._upload(np.array([s.think_end_token_id for s in limited], np.int64)),
        )

    def _logprobs(self, samplings: list[ResolvedSampling]) -> LogprobRequest | None:
        positions = [i for i, s in enumerate(samplings) if s.logprobs is not None or s.logprob_token_ids]
        if not positions:
            return None
        asked = [samplings[i] for i in positions]
        num_named = [len(s.logprob_token_ids) for s in asked]
        named = np.zeros((len(asked), max(num_named)), np.int64)
        for i, sampling in enumerate(asked):
            named[i, : num_named[i]] = sampling.logprob_token_ids
        return LogprobRequest(
            index=self._upload(np.array(positions, np.int64)),
            positions=positions,
            num_top=[resolve_num_top(s.logprobs, self._vocab_size) for s in asked],
            named=self._upload(named) if max(num_named) else None,
            num_named=num_named,
        )


def resolve_num_top(asked: int | None, vocab_size: int) -> int:
    """How many most likely tokens to report: -1 means the vocabulary, None none."""
    if asked is None:
        return 0
    return vocab_size if asked < 0 else min(asked, vocab_size)


def has_thinking_budget(sampling: ResolvedSampling) -> bool:
    """Whether the request's thinking is limited: -1 and None mean no."""
    return sampling.thinking_token_budget is not None and sampling.thinking_token_budget >= 0

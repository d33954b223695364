"""Sampler: logits of L rows to one token each, with the logprobs that were asked for.

Order: grammar mask, allowed ids, bias, bad words, minimum length, thinking budget, third-party processors that may
change the most likely token, penalties, temperature, processors that may not, min-p, top-k, top-p, draw. A greedy row
takes the most likely token after the penalties. Everything is batched; a feature costs nothing where no row asks for
it. Knows no model and no cache. ``row_parameters.py`` holds the parameters, ``kernels/sampling/`` the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.sampling.candidates import most_likely_ref
from octavo.kernels.sampling.draw import draw_ref, uniform_ref
from octavo.kernels.sampling.filters import FilterColumns, draw_narrow_ref, kept_threshold_ref
from octavo.kernels.sampling.logprobs import token_values_ref
from octavo.kernels.sampling.masks import apply_bitmask_ref
from octavo.kernels.sampling.penalties import apply_penalties_ref
from octavo.kernels.sampling.rows import draw_rows
from octavo.messages import ResolvedSampling
from octavo.sampling.builtin import ThinkingState, apply_bad_words, apply_min_tokens, apply_static_masks
from octavo.sampling.logits_processor import LogitsProcessor, ProcessorContext
from octavo.sampling.row_parameters import Filters, IntArray, LogprobRequest, RowParameters, SamplingBatch

NO_TOKEN_MESSAGE = (
    "no token could be drawn: the logits are not numbers (NaN), or the request's own restrictions "
    "(allowed_token_ids, bad_words, min_tokens, logit_bias) rule out every token"
)


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Values on the device for the rows that asked; ``request`` tells which columns are whose."""

    request: LogprobRequest
    token_ids: Tensor
    """[W, 1 + K + M] int64: drawn token, most likely ones, ids by name."""
    values: Tensor
    ranks: Tensor


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Results of L rows, still on the device."""

    token_ids: Tensor
    """[L] int64; -1 where no token could be drawn."""
    logprobs: SampledLogprobs | None
    errors: dict[int, str]
    """Batch position to what its processor raised."""


class Sampler:
    """One per worker: owns the sampling state of every row."""

    def __init__(
        self,
        context: ProcessorContext,
        logprobs_mode: str = "raw_logprobs",
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """Args:
        context: Sizes, and the histories that penalties and bad words read.
        logprobs_mode: raw_logprobs, raw_logits, processed_logprobs or processed_logits.
        processors: Third-party processors.
        """
        assert logprobs_mode in ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
        self._context = context
        self._is_raw = logprobs_mode.startswith("raw")
        self.is_normalised = logprobs_mode.endswith("logprobs")
        self._parameters = RowParameters(context.max_num_seqs, context.vocab_size, context.device)
        self._thinking = ThinkingState(context.max_num_seqs, context.device)
        self._processors = [ActiveProcessor(processor) for processor in processors]
        self._failed_rows: dict[int, str] = {}
        self._batches: dict[bytes, SamplingBatch] = {}

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> None:
        """A request takes the row; ``token_ids`` are all known ones (prompt, and outputs kept across a preemption)."""
        self._batches.clear()
        self._parameters.add(row, sampling, num_prompt_tokens)
        self._thinking.add(row, sampling, token_ids, num_prompt_tokens)
        for processor in self._processors:
            error = processor.add(row, sampling, token_ids, num_prompt_tokens)
            if error is not None:
                self._failed_rows[row] = error

    def remove(self, row: int) -> None:
        """The row is free again."""
        self._batches.clear()
        self._parameters.remove(row)
        self._failed_rows.pop(row, None)
        for processor in self._processors:
            processor.remove(row)

    def sample(
        self, logits: Tensor, rows: IntArray, length_L: Tensor, max_length: int, mask: Tensor | None
    ) -> SamplerOutput:
        """Draw one token for each row.

        Args:
            logits: ``[L, V]``, any float dtype. A float32 tensor is overwritten.
            rows: ``[L]`` on the host.
            length_L: ``[L]`` int64 on the device: known tokens, so the position of the token to draw.
            max_length: Host integer, not below any entry of ``length_L``.
            mask: ``[L, ceil(V / 32)]`` int32 grammar bits, or None.
        """
        batch = self._batch(rows)
        logits = logits.float()
        raw = self._keep_raw(logits, batch)
        errors: dict[int, str] = {}
        if self._failed_rows:
            errors = {i: self._failed_rows[row] for i, row in enumerate(rows.tolist()) if row in self._failed_rows}
        self._mask(logits, batch, length_L, mask)
        if self._processors:
            self._context.num_tokens.index_copy_(0, batch.rows, length_L)
        for processor in self._processors:
            if not processor.keeps_argmax:
                processor.apply(logits, rows, errors)
        self._penalise(logits, batch, length_L, max_length)
        token, processed = self._choose(logits, batch, length_L, rows, errors)
        if batch.thinking is not None:
            self._thinking.update(batch.thinking, token, length_L)
        return SamplerOutput(token, self._logprobs(raw, processed, token, batch), errors)

    def _batch(self, rows: IntArray) -> SamplingBatch:
        """Gathered once per set of rows; forgotten when a row changes hands."""
        key = rows.tobytes()
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= 8:
                self._batches.clear()
            batch = self._batches[key] = self._parameters.gather(rows)
        return batch

    def _keep_raw(self, logits: Tensor, batch: SamplingBatch) -> Tensor | None:
        """The logits of the rows that want raw logprobs, before anything changes them."""
        if batch.logprobs is None or not self._is_raw:
            return None
        return logits.index_select(0, batch.logprobs.index)

    def _mask(self, logits: Tensor, batch: SamplingBatch, length_L: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            apply_bitmask_ref(logits, mask)
        apply_static_masks(logits, batch)
        if batch.bad_words is not None:
            apply_bad_words(logits, batch.bad_words, length_L, self._context.token_ids)
        apply_min_tokens(logits, batch, length_L)
        if batch.thinking is not None:
            self._thinking.force_end(logits, batch.thinking, length_L)

    def _penalise(self, logits: Tensor, batch: SamplingBatch, length_L: Tensor, max_length: int) -> None:
        penalties = batch.penalties
        if penalties is None or max_length <= penalties.first_position:
            return
        is_whole = penalties.index.shape[0] == logits.shape[0]
        chosen = logits if is_whole else logits.index_select(0, penalties.index)
        window = self._context.token_ids[:, penalties.first_position : max_length]
        apply_penalties_ref(
            chosen,
            window.index_select(0, penalties.rows).long(),
            penalties.first_position,
            penalties.num_prompt,
            length_L.index_select(0, penalties.index),
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
        )
        if not is_whole:
            logits.index_copy_(0, penalties.index, chosen)

    def _choose(
        self, logits: Tensor, batch: SamplingBatch, length_L: Tensor, rows: IntArray, errors: dict[int, str]
    ) -> tuple[Tensor, Tensor]:
        """The tokens ``[L]``, and the logits they were drawn from (complete only where processed logprobs need it)."""
        is_shown = batch.logprobs is not None and not self._is_raw
        if batch.columns is not None and not is_shown and not self._has_active_keeping_argmax():
            index = torch.arange(len(logits), device=logits.device)
            return draw_rows(logits, batch.columns, index, length_L, has_filters=batch.filters is not None), logits
        if batch.num_random == 0:
            return most_likely_ref(logits), logits
        index = batch.random_index
        drawn_from = logits if index is None else logits.index_select(0, index)
        drawn_from.div_(batch.temperature)
        self._apply_keeping_argmax(drawn_from, batch, rows, errors)
        position = length_L - batch.num_prompt
        position = position if index is None else position.index_select(0, index)
        token = _draw(drawn_from, batch.filters, uniform_ref(batch.stream, position), is_shown)
        if index is None:
            return token, drawn_from
        token = most_likely_ref(logits).index_copy_(0, index, token)
        if is_shown:
            logits.index_copy_(0, index, drawn_from)
        return token, logits

    def _has_active_keeping_argmax(self) -> bool:
        return any(processor.keeps_argmax and processor.is_active for processor in self._processors)

    def _apply_keeping_argmax(
        self, drawn_from: Tensor, batch: SamplingBatch, rows: IntArray, errors: dict[int, str]
    ) -> None:
        active = [processor for processor in self._processors if processor.keeps_argmax]
        if not active:
            return
        index = np.arange(len(rows)) if batch.random_index is None else batch.random_index.cpu().numpy()
        for processor in active:
            failed: dict[int, str] = {}
            processor.apply(drawn_from, rows[index], failed)
            errors.update({int(index[i]): message for i, message in failed.items()})

    def _logprobs(
        self, raw: Tensor | None, processed: Tensor, token: Tensor, batch: SamplingBatch
    ) -> SampledLogprobs | None:
        request = batch.logprobs
        if request is None:
            return None
        values = processed.index_select(0, request.index) if raw is None else raw
        drawn = token.index_select(0, request.index).clamp(min=0)
        ids, values, ranks = token_values_ref(values, drawn, max(request.num_top), request.named, self.is_normalised)
        return SampledLogprobs(request, ids, values, ranks)


class ActiveProcessor:
    """A third-party processor and the rows that it accepted. What it raises stays with the rows it raised for."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self._processor = processor
        self._name = type(processor).__qualname__
        self._rows: set[int] = set()
        self.keeps_argmax = processor.keeps_argmax

    @property
    def is_active(self) -> bool:
        """Whether it accepted any row."""
        return bool(self._rows)

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> str | None:
        """Offer a request; the error's text when the processor raised."""
        try:
            is_needed = self._processor.add(row, sampling, token_ids, num_prompt_tokens)
        except Exception as error:  # third-party code: one request's trouble must not end the engine
            return self._describe(error)
        if is_needed:
            self._rows.add(row)
        return None

    def remove(self, row: int) -> None:
        """The row is free again."""
        if row in self._rows:
            self._rows.discard(row)
            self._processor.remove(row)

    def apply(self, logits: Tensor, rows: IntArray, errors: dict[int, str]) -> None:
        """Change the accepted rows' logits in place; note in ``errors`` (batch position) the rows that raised."""
        if not self._rows:
            return
        index = [i for i, row in enumerate(rows.tolist()) if row in self._rows]
        if not index:
            return
        before = logits[index]
        error = self._try(logits, index, before, rows)
        if error is None:
            return
        if len(index) == 1:
            errors[index[0]] = error
            return
        for k, i in enumerate(index):
            error = self._try(logits, [i], before[k : k + 1], rows)
            if error is not None:
                errors[i] = error

    def _try(self, logits: Tensor, index: list[int], before: Tensor, rows: IntArray) -> str | None:
        changed = before.clone()
        try:
            self._processor.apply(changed, torch.from_numpy(rows[index]).to(logits.device))
        except Exception as error:  # third-party code, as in add()
            return self._describe(error)
        logits[index] = changed
        return None

    def _describe(self, error: Exception) -> str:
        return f"logits processor {self._name} raised {type(error).__name__}: {error}"


def _draw(logits: Tensor, filters: Filters | None, uniform: Tensor, is_shown: bool) -> Tensor:
    """A token for each row. ``is_shown``: write into ``logits`` what the filters rule out, for processed logprobs."""
    if filters is None:
        return draw_ref(logits.softmax(dim=1), uniform)
    if is_shown:
        _rule_out(logits, filters)
        return draw_ref(logits.softmax(dim=1), uniform)
    if filters.index is None or filters.others is None:
        return _draw_filtered(logits, filters.columns, uniform)
    token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    chosen = _draw_filtered(logits.index_select(0, filters.index), filters.columns, uniform[filters.index])
    token.index_copy_(0, filters.index, chosen)
    rest = logits.index_select(0, filters.others).softmax(dim=1)
    return token.index_copy_(0, filters.others, draw_ref(rest, uniform[filters.others]))


def _draw_filtered(logits: Tensor, columns: FilterColumns, uniform: Tensor) -> Tensor:
    """From the most likely tokens where these suffice, else from all."""
    token, is_complete = draw_narrow_ref(logits, columns, uniform)
    rest = (~is_complete).nonzero().squeeze(1)
    if len(rest) > 0:
        wide = logits.index_select(0, rest)
        threshold = kept_threshold_ref(wide, columns.select(rest))
        # Written so that NaN is kept: it must not look like a token that was cut off.
        weights = torch.where(wide < threshold.unsqueeze(1), -torch.inf, wide).softmax(dim=1)
        token.index_copy_(0, rest, draw_ref(weights, uniform[rest]))
    return token


def _rule_out(logits: Tensor, filters: Filters) -> None:
    """Write -inf where min-p, top-k and top-p cut off. In place."""
    chosen = logits if filters.index is None else logits.index_select(0, filters.index)
    threshold = kept_threshold_ref(chosen, filters.columns)
    chosen.masked_fill_(chosen < threshold.unsqueeze(1), -torch.inf)
    if filters.index is not None:
        logits.index_copy_(0, filters.index, chosen)

"""Drawing for requests that ask for no more than temperature, top-k, top-p and min-p, from columns on the device.

Most requests are like that. Their draw has fixed shapes and reads nothing from the host, so it is part of a captured
decode step, and a step of new prompts does not pay for gathering parameters. Everything else is the sampler's; the
tokens are the same as the sampler's, because the arithmetic is the same.
"""

from __future__ import annotations

import enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.device import Device
from octavo.kernels.sampling.draw import mix_seed
from octavo.kernels.sampling.rows import RowColumns, draw_rows
from octavo.messages import NewRow, ResolvedSampling
from octavo.sampling.row_parameters import has_thinking_budget


class DrawKind(enum.IntEnum):
    """What a set of rows needs; the largest of its rows' kinds."""

    PLAIN = 0
    """The most likely token, or a draw at a temperature."""
    FILTERED = 1
    """With min-p, top-k or top-p for some rows."""
    OTHER = 2
    """More: the sampler's work."""


def kind_of(sampling: ResolvedSampling, vocab_size: int) -> DrawKind:
    """The kind of one request's parameters."""
    is_simple = (
        sampling.presence_penalty == 0.0
        and sampling.frequency_penalty == 0.0
        and sampling.repetition_penalty == 1.0
        and sampling.min_tokens == 0
        and sampling.logprobs is None
        and not sampling.logprob_token_ids
        and not sampling.logit_bias
        and not sampling.allowed_token_ids
        and not sampling.bad_words_token_ids
        and not has_thinking_budget(sampling)
    )
    if not is_simple:
        return DrawKind.OTHER
    is_filtered = 0 < sampling.top_k < vocab_size or sampling.top_p < 1 or sampling.min_p > 0
    return DrawKind.FILTERED if sampling.temperature > 0 and is_filtered else DrawKind.PLAIN


class PlainSampling:
    """Kinds of all rows on the host, temperatures and streams on the device."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: Device, *, has_processors: bool) -> None:
        """Args:
        max_num_seqs: Rows; there is a dummy one behind them.
        vocab_size: Columns of the logits.
        device: Where the columns live.
        has_processors: Third-party processors may change any request's logits, so nothing is plain.
        """
        self._device = device
        self._vocab_size = vocab_size
        self._has_processors = has_processors
        self._kind = np.zeros(max_num_seqs + 1, np.int8)
        count = (max_num_seqs + 1,)
        self._columns = RowColumns(
            temperature=device.zeros(count, torch.float32),
            stream=device.zeros(count, torch.int64),
            num_prompt=device.zeros(count, torch.int64),
            log_min_p=device.zeros(count, torch.float32).fill_(-torch.inf),
            top_k=device.zeros(count, torch.int64),
            top_p=device.zeros(count, torch.float64).fill_(1.0),
        )

    def add(self, new_rows: list[NewRow]) -> None:
        """Requests take their rows."""
        for new in new_rows:
            kind = DrawKind.OTHER if self._has_processors else kind_of(new.sampling, self._vocab_size)
            self._kind[new.row] = kind
        params = [new.sampling for new in new_rows]
        top_k = np.array([p.top_k if 0 < p.top_k < self._vocab_size else 0 for p in params], np.int64)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(np.array([p.min_p for p in params], np.float32))
        index, *values = self._device.upload_all(
            (
                np.array([new.row for new in new_rows], np.int64),
                np.array([p.temperature for p in params], np.float32),
                np.array([mix_seed(p.seed) for p in params], np.int64),
                np.array([new.num_prompt_tokens for new in new_rows], np.int64),
                log_min_p,
                top_k,
                np.array([p.top_p for p in params], np.float64),
            )
        )
        columns = self._columns
        targets = (
            columns.temperature, columns.stream, columns.num_prompt, columns.log_min_p, columns.top_k, columns.top_p
        )  # fmt: skip
        for column, value in zip(targets, values, strict=True):
            column.index_copy_(0, index, value)

    def kind(self, rows: NDArray[np.int64]) -> DrawKind:
        """Of a set of rows."""
        return DrawKind(int(self._kind[rows].max(initial=0)))

    def draw(self, kind: DrawKind, logits: Tensor, row_index: Tensor, lengths: Tensor) -> Tensor:
        """``[L]`` int64 tokens, -1 where none can be drawn. Fixed shapes; on a GPU nothing is read back.

        Args:
            kind: PLAIN or FILTERED.
            logits: ``[L, V]``, any float dtype.
            row_index: ``[L]`` int64.
            lengths: ``[L]`` int64 known tokens.
        """
        assert kind is not DrawKind.OTHER
        return draw_rows(logits, self._columns, row_index, lengths, has_filters=kind is DrawKind.FILTERED)

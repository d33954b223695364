"""The masks that are built in: grammar bits, allowed ids, bias, bad words, minimum length, thinking budget.

Each is applied for all rows of the batch at once and skipped when no row has it. Their lists come ready from
``row_parameters.py``. Knows no draw; ``sampler.py`` decides the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.sampling.masks import add_entries_ref, ban_where_ref, keep_only_ref, match_suffix_ref
from octavo.messages import ResolvedSampling
from octavo.sampling.row_parameters import BadWords, SamplingBatch, Thinking, has_thinking_budget


class ThinkingState:
    """Where each row's open think block began, on the device; the drawn tokens move it."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._open_since = torch.full((max_num_seqs,), -1, dtype=torch.int64, device=device)

    def add(self, row: int, sampling: ResolvedSampling, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Find the open block of a request that takes the row; one of the prompt counts from the prompt's end."""
        if has_thinking_budget(sampling):
            since = find_open_block(token_ids, sampling.think_start_token_id, sampling.think_end_token_id)
            self._open_since[row] = -1 if since < 0 else max(since, num_prompt_tokens - 1)

    def force_end(self, logits: Tensor, thinking: Thinking, length_L: Tensor) -> None:
        """Leave only the end token where the budget is spent. In place."""
        since = self._open_since.index_select(0, thinking.rows)
        spent = length_L.index_select(0, thinking.index) - since - 1
        is_over = (since >= 0) & (spent >= thinking.budget)
        chosen = logits.index_select(0, thinking.index)
        only_end = torch.full_like(chosen, -torch.inf).scatter_(1, thinking.end_token.unsqueeze(1), 0.0)
        logits.index_copy_(0, thinking.index, torch.where(is_over.unsqueeze(1), only_end, chosen))

    def update(self, thinking: Thinking, token_L: Tensor, length_L: Tensor) -> None:
        """Note the tokens just drawn; ``length_L`` is their position."""
        token = token_L.index_select(0, thinking.index)
        since = self._open_since.index_select(0, thinking.rows)
        position = length_L.index_select(0, thinking.index)
        since = torch.where((token == thinking.start_token) & (since < 0), position, since)
        since = torch.where(token == thinking.end_token, -1, since)
        self._open_since.index_copy_(0, thinking.rows, since)


def find_open_block(token_ids: list[int], start: int, end: int) -> int:
    """Position of the first ``start`` after the last ``end``; -1 when no block is open."""
    last_end = len(token_ids) - 1 - token_ids[::-1].index(end) if end in token_ids else -1
    try:
        return token_ids.index(start, last_end + 1)
    except ValueError:
        return -1


def apply_static_masks(logits: Tensor, batch: SamplingBatch) -> None:
    """Allowed ids and bias: the same at every position. In place."""
    if batch.allowed is not None and batch.restricted is not None:
        keep_only_ref(logits, batch.restricted, batch.allowed.position, batch.allowed.token)
    if batch.bias is not None:
        add_entries_ref(logits, batch.bias.position, batch.bias.token, batch.bias.value)


def apply_bad_words(logits: Tensor, words: BadWords, length_L: Tensor, history: Tensor) -> None:
    """Rule out the last token of each word whose other tokens end the output. In place.

    Args:
        logits: ``[L, V]`` float32. Written.
        words: The entries of the batch.
        length_L: ``[L]`` int64 known tokens.
        history: ``[rows, max_model_len]`` int32.
    """
    length = length_L.index_select(0, words.entries.position)
    num_before = words.entries.value
    width = words.prefix.shape[1]
    column = torch.arange(-width, 0, device=logits.device)
    position = (length.unsqueeze(1) + column).clamp_(min=0)
    tail = history[words.row.unsqueeze(1), position].long()
    is_output = length - num_before >= words.num_prompt
    is_banned = match_suffix_ref(tail, words.prefix, num_before) & is_output
    ban_where_ref(logits, words.entries.position, words.entries.token, is_banned)


def apply_min_tokens(logits: Tensor, batch: SamplingBatch, length_L: Tensor) -> None:
    """Rule out end tokens while the output is shorter than asked. In place."""
    if batch.min_tokens is not None:
        entries = batch.min_tokens
        is_banned = length_L.index_select(0, entries.position) < entries.value
        ban_where_ref(logits, entries.position, entries.token, is_banned)

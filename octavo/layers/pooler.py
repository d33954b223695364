"""From hidden states to one vector per text: which states count, over however many steps a text takes.

One accumulator per row of the worker. Sums are float32 whatever the model computes in. What comes after (a classifier's
head, an activation) is not known here, but for ``activate``, which is the same for all models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Pooler:
    """CLS (the state of the first token), LAST, or MEAN of all states."""

    def __init__(self, pooling_type: str, num_rows: int, hidden_size: int, device: torch.device) -> None:
        """Make an empty one.

        Args:
            pooling_type: ``CLS``, ``LAST`` or ``MEAN``.
            num_rows: Texts that may be under way at the same time.
            hidden_size: Of a state.
            device: Of the states.
        """
        self._type = pooling_type
        self._states = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device)

    def reset(self, rows: Tensor) -> None:
        """New texts take these rows, ``[R]`` int64."""
        self._states.index_fill_(0, rows, 0.0)

    def add(self, hidden: Tensor, token_row: Tensor, first_rows: Tensor, first_tokens: Tensor) -> None:
        """Take in a step.

        Args:
            hidden: ``[T, E]``.
            token_row: ``[T]`` int64 row of each token.
            first_rows: ``[S]`` int64 rows of the texts that begin in this step.
            first_tokens: ``[S]`` int64 places of their first tokens.
        """
        if self._type == "MEAN":
            self._states.index_add_(0, token_row, hidden.float())
        elif self._type == "CLS":
            self._states.index_copy_(0, first_rows, hidden.index_select(0, first_tokens).float())

    def finish(self, hidden: Tensor, rows: Tensor, last_tokens: Tensor, lengths: Tensor) -> Tensor:
        """``[L, E]`` float32 of the texts whose last token is in this step, after ``add``.

        Args:
            hidden: ``[T, E]``.
            rows: ``[L]`` int64.
            last_tokens: ``[L]`` int64 places in the step.
            lengths: ``[L]`` int64 tokens of each text.
        """
        if self._type == "LAST":
            return hidden.index_select(0, last_tokens).float()
        states = self._states.index_select(0, rows)
        return states / lengths[:, None] if self._type == "MEAN" else states


def activate(values: Tensor, activation: str) -> Tensor:
    """``[..., N]`` float32 through ``normalize`` (to length 1), ``softmax``, ``sigmoid`` or ``none``."""
    if activation == "normalize":
        return F.normalize(values, dim=-1)
    if activation == "softmax":
        return values.softmax(-1)
    if activation == "sigmoid":
        return values.sigmoid()
    assert activation == "none", activation
    return values

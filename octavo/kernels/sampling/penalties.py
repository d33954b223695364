"""Repetition, presence and frequency penalties, computed from the token history at every step.

No table of counts is kept: the work is proportional to the length of the text instead of the vocabulary, and a row
that comes back after a preemption needs nothing restored. Knows no request.

Paper: Keskar et al., "CTRL", 2019 (repetition penalty).
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_penalties_ref(
    logits_LV: Tensor,
    history_LS: Tensor,
    first_position: int,
    num_prompt_L: Tensor,
    length_L: Tensor,
    repetition_L: Tensor,
    presence_L: Tensor,
    frequency_L: Tensor,
) -> None:
    """Change the logits of tokens that occur in the history, in place.

    A token that occurs in prompt or output has its logit divided (if positive) or multiplied by ``repetition``; one
    that occurs ``c > 0`` times in the output then loses ``presence + c * frequency``.

    Args:
        logits_LV: ``[L, V]`` float32. Written.
        history_LS: ``[L, S]`` int64 valid token ids; column ``s`` is the token at ``first_position + s``. Columns at
            or beyond a row's length hold any valid id.
        first_position: 0 if any row's ``repetition`` is not 1; else not beyond any row's prompt.
        num_prompt_L: ``[L]`` int64.
        length_L: ``[L]`` int64, known tokens.
        repetition_L: ``[L]`` float32, 1 = none.
        presence_L: ``[L]`` float32, 0 = none.
        frequency_L: ``[L]`` float32, 0 = none.
    """
    position = torch.arange(first_position, first_position + history_LS.shape[1], device=logits_LV.device)
    is_known = position < length_L.unsqueeze(1)
    is_output = is_known & (position >= num_prompt_L.unsqueeze(1))
    counts = torch.zeros_like(logits_LV).scatter_add_(1, history_LS, is_output.to(logits_LV.dtype))
    # An unknown column must change nothing: let it repeat the row's first column, whose change is the same.
    tokens = torch.where(is_known, history_LS, history_LS[:, :1])
    is_any_known = is_known[:, :1]
    values = logits_LV.gather(1, tokens)
    count = counts.gather(1, tokens)
    repetition = repetition_L.unsqueeze(1).where(is_any_known, torch.ones_like(repetition_L).unsqueeze(1))
    changed = torch.where(values > 0, values / repetition, values * repetition)
    changed -= frequency_L.unsqueeze(1) * count
    changed -= presence_L.unsqueeze(1) * (count > 0)
    # The same token at several places gets the same value at each, so the order of writing does not matter.
    logits_LV.scatter_(1, tokens, changed)

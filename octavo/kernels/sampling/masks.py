"""Rule tokens out: packed bit masks, lists of allowed tokens, conditional bans. In place, no host synchronisation.

Bans are lists of (batch position, token) entries: they cost what they name, not the vocabulary. Knows no request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_bitmask_ref(logits_LV: Tensor, mask_LW: Tensor) -> None:
    """Rule out every token whose bit is 0.

    Args:
        logits_LV: ``[L, V]`` float32. Written.
        mask_LW: ``[L, ceil(V / 32)]`` int32; token ``v`` is bit ``v % 32`` of word ``v // 32``.
    """
    bits = torch.arange(32, dtype=torch.int32, device=mask_LW.device)
    is_allowed = ((mask_LW.unsqueeze(2) >> bits) & 1).view(mask_LW.shape[0], -1)[:, : logits_LV.shape[1]]
    logits_LV.masked_fill_(is_allowed == 0, -torch.inf)


def keep_only_ref(logits_LV: Tensor, restricted_R: Tensor, entry_position_M: Tensor, entry_token_M: Tensor) -> None:
    """In the batch positions ``restricted_R``, rule out all but the tokens of the entries.

    Args:
        logits_LV: ``[L, V]`` float32. Written.
        restricted_R: ``[R]`` int64 batch positions.
        entry_position_M: ``[M]`` int64 batch position of each entry, all of them in ``restricted_R``.
        entry_token_M: ``[M]`` int64 allowed token of each entry.
    """
    kept = logits_LV[entry_position_M, entry_token_M]
    logits_LV.index_fill_(0, restricted_R, -torch.inf)
    logits_LV[entry_position_M, entry_token_M] = kept


def add_entries_ref(logits_LV: Tensor, entry_position_M: Tensor, entry_token_M: Tensor, value_M: Tensor) -> None:
    """``logits[position, token] += value`` for each entry; a token may be named more than once. In place."""
    logits_LV.index_put_((entry_position_M, entry_token_M), value_M, accumulate=True)


def ban_where_ref(logits_LV: Tensor, entry_position_M: Tensor, entry_token_M: Tensor, is_banned_M: Tensor) -> None:
    """Rule out the entries whose flag is set, in place. An entry twice with different flags is ruled out."""
    value = torch.zeros_like(is_banned_M, dtype=logits_LV.dtype).masked_fill_(is_banned_M, -torch.inf)
    add_entries_ref(logits_LV, entry_position_M, entry_token_M, value)


def match_suffix_ref(history_MS: Tensor, prefix_MS: Tensor, prefix_length_M: Tensor) -> Tensor:
    """Whether the last ``prefix_length`` tokens equal the prefix.

    Args:
        history_MS: ``[M, S]`` int64, the last S tokens of each entry's text, right-aligned.
        prefix_MS: ``[M, S]`` int64, right-aligned.
        prefix_length_M: ``[M]`` int64 <= S.

    Returns:
        ``[M]`` bool; True for length 0.
    """
    width = prefix_MS.shape[1]
    column = torch.arange(width, device=prefix_MS.device)
    is_outside = column < (width - prefix_length_M).unsqueeze(1)
    return ((history_MS == prefix_MS) | is_outside).all(dim=1)

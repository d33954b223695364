"""min-p, top-k and top-p as one threshold per row: a token stays when its logit is at least the threshold.

A threshold instead of a sorted vocabulary: equal logits stay or go together, so the result does not depend on how a
sort breaks ties (which are common in bfloat16), nor on the rest of the batch. Knows no draw and no request.

Papers: Fan et al., ACL 2018 (top-k); Holtzman et al., "The curious case of neural text degeneration", ICLR 2020
(top-p); Nguyen et al., "Turning up the heat: min-p sampling", ICLR 2025 (min-p).
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_CANDIDATES = 256
"""Most likely tokens looked at first; nearly all top-p sets are smaller."""
_GROWTH = 16


def kept_threshold_ref(
    logits_LV: Tensor, log_min_p_L: Tensor | None, top_k_L: Tensor | None, max_top_k: int, top_p_L: Tensor | None
) -> Tensor:
    """Smallest logit that stays in each row; at least the most likely token always does.

    min-p first, then top-k, then top-p over the renormalised rest: the smallest set of most likely tokens whose share
    reaches ``top_p``.

    Args:
        logits_LV: ``[L, V]`` float32, divided by the temperature.
        log_min_p_L: ``[L]`` float32, ``log(min_p)``, -inf for none; None when no row has one.
        top_k_L: ``[L]`` int64 in ``[1, V]``, 0 for all; None when no row has one.
        max_top_k: Host integer, the largest entry of ``top_k_L``.
        top_p_L: ``[L]`` float64 in (0, 1]; None when every row's is 1.

    Returns:
        ``[L]`` float32.
    """
    vocab_size = logits_LV.shape[1]
    wanted = max(max_top_k, 1 if top_p_L is None else _FIRST_CANDIDATES)
    ranked = logits_LV.topk(min(wanted, vocab_size), dim=1).values if wanted > 1 else logits_LV.amax(1, keepdim=True)
    best = ranked[:, :1]
    threshold = torch.full_like(best, -torch.inf)
    if log_min_p_L is not None:
        # The rounding of best + log(1) must not rule out the best token itself.
        threshold = torch.minimum(best + log_min_p_L.unsqueeze(1), best)
    if top_k_L is not None:
        kth = ranked.gather(1, (top_k_L - 1).clamp(min=0).unsqueeze(1))
        threshold = torch.where((top_k_L > 0).unsqueeze(1), torch.maximum(threshold, kth), threshold)
    if top_p_L is not None:
        threshold = _raise_to_top_p(logits_LV, ranked, threshold, top_p_L.unsqueeze(1))
    return threshold.squeeze(1)


def _raise_to_top_p(logits_LV: Tensor, ranked_LK: Tensor, threshold_L1: Tensor, top_p_L1: Tensor) -> Tensor:
    """``threshold_L1``, raised where the top-p set is smaller. Looks at more candidates until every row's set fits."""
    best = ranked_LK[:, :1]
    weights = (logits_LV - best).exp_()
    total = weights.masked_fill_(logits_LV < threshold_L1, 0.0).sum(dim=1, keepdim=True, dtype=torch.float64)
    is_free = top_p_L1 >= 1.0
    while True:
        cumulative = (ranked_LK - best).double().exp_().cumsum(dim=1)
        is_reached = (cumulative >= top_p_L1 * total) | (ranked_LK <= threshold_L1) | is_free
        is_found = is_reached.any(dim=1)
        if ranked_LK.shape[1] == logits_LV.shape[1] or bool(is_found.all()):
            break
        ranked_LK = logits_LV.topk(min(ranked_LK.shape[1] * _GROWTH, logits_LV.shape[1]), dim=1).values
    first = is_reached.to(torch.uint8).argmax(dim=1, keepdim=True)
    raised = torch.maximum(ranked_LK.gather(1, first), threshold_L1)
    return torch.where(is_found.unsqueeze(1) & ~is_free, raised, threshold_L1)

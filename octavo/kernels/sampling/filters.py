"""min-p, top-k and top-p: a token stays when its logit is at least its row's threshold.

A threshold instead of a sorted vocabulary: equal logits stay or go together, so the result does not depend on how a
sort breaks ties (which are common in bfloat16), nor on the rest of the batch. min-p comes first, then top-k, then top-p
over the renormalised rest: the smallest set of most likely tokens whose share reaches ``top_p``.

``draw_narrow_ref`` answers from the 64 most likely tokens, which is nearly always enough; ``kept_threshold_ref`` is for
the rows where it is not. Knows no request.

Papers: Fan et al., ACL 2018 (top-k); Holtzman et al., "The curious case of neural text degeneration", ICLR 2020
(top-p); Nguyen et al., "Turning up the heat: min-p sampling", ICLR 2025 (min-p).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.sampling.candidates import top_candidates_ref

NUM_CANDIDATES = 64
_BINS = 4096
_RANGE = 32.0
"""Logits further below the best one share the last bin: e^-32 of the best token's probability is nothing."""
_ROWS_AT_ONCE = 16
"""Rows whose histograms are made together: bounds memory."""


@dataclass(frozen=True, slots=True)
class FilterColumns:
    """Parameters of L rows; a column is None when no row has that filter."""

    log_min_p: Tensor | None
    """[L] float32, ``log(min_p)``, -inf for none."""
    top_k: Tensor | None
    """[L] int64 in [1, V], 0 for all."""
    max_top_k: int
    """Host integer, the largest of ``top_k``."""
    top_p: Tensor | None
    """[L] float64 in (0, 1], 1 for all."""

    def select(self, index: Tensor) -> FilterColumns:
        """The columns of some rows."""
        log_min_p, top_k, top_p = (
            None if column is None else column.index_select(0, index)
            for column in (self.log_min_p, self.top_k, self.top_p)
        )
        return FilterColumns(log_min_p, top_k, self.max_top_k, top_p)


def _rank_threshold(ranked_LK: Tensor, filters: FilterColumns) -> Tensor:
    """``[L, 1]`` threshold of min-p and top-k; ``ranked_LK`` falling, at least ``max_top_k`` wide or clamped to it."""
    best = ranked_LK[:, :1]
    threshold = torch.full_like(best, -torch.inf)
    if filters.log_min_p is not None:
        # The rounding of best + log(1) must not rule out the best token itself.
        threshold = torch.minimum(best + filters.log_min_p.unsqueeze(1), best)
    if filters.top_k is not None:
        top_k = filters.top_k.unsqueeze(1)
        kth = ranked_LK.gather(1, (top_k - 1).clamp(min=0, max=ranked_LK.shape[1] - 1))
        threshold = torch.where(top_k > 0, torch.maximum(threshold, kth), threshold)
    return threshold


def draw_narrow_ref(logits_LV: Tensor, filters: FilterColumns, uniform_L: Tensor) -> tuple[Tensor, Tensor]:
    """Filter and draw among the most likely tokens, where these hold all that the filters keep.

    Args:
        logits_LV: ``[L, V]`` float32, divided by the temperature.
        filters: Of the same rows.
        uniform_L: ``[L]`` float64 in ``[0, 1)``.

    Returns:
        ``token [L]`` int64, and ``is_complete [L]`` bool. Where it is False the token means nothing: the set is wider,
        or the logits are NaN. Where it is True the token is the one that ``draw_ref`` finds among the kept tokens.
    """
    count = min(NUM_CANDIDATES, logits_LV.shape[1])
    ranked, tokens = top_candidates_ref(logits_LV, count)
    best, last = ranked[:, :1], ranked[:, -1:]
    threshold = _rank_threshold(ranked, filters)
    weights = (ranked - best).double().exp_()
    weights = torch.where(ranked >= threshold, weights, 0.0)
    # Everything outside is below the last candidate, so a threshold above it keeps nothing outside.
    is_closed = (threshold > last) | (last == -torch.inf)
    if count == logits_LV.shape[1]:
        is_closed = torch.ones_like(is_closed)
    if filters.top_p is not None:
        top_p = filters.top_p.unsqueeze(1)
        total = weights.sum(dim=1, keepdim=True)
        is_open = ~is_closed & (threshold == -torch.inf) & (top_p < 1)
        if bool(is_open.any()):
            whole = (logits_LV - best).exp_().sum(dim=1, keepdim=True, dtype=torch.float64)
            total = torch.where(is_open, whole, total)
        threshold = _cut_at_share(ranked, weights, threshold, top_p, total)
        is_closed |= is_open & (threshold > last)
        weights = torch.where(ranked >= threshold, weights, 0.0)
    # In the order of token ids, as draw_ref has it: which token a number means must not depend on the way it was found.
    order = tokens.argsort(dim=1)
    cdf = weights.gather(1, order).cumsum(dim=1)
    target = uniform_L.unsqueeze(1) * cdf[:, -1:]
    place = torch.searchsorted(cdf, target, right=True).clamp_(max=count - 1)
    return tokens.gather(1, order.gather(1, place)).squeeze(1), (is_closed & (cdf[:, -1:] > 0)).squeeze(1)


def _cut_at_share(
    ranked_LK: Tensor, weights_LK: Tensor, threshold_L1: Tensor, top_p_L1: Tensor, total_L1: Tensor
) -> Tensor:
    """The threshold, raised to the first candidate at which the share is reached where there is one."""
    is_reached = weights_LK.cumsum(dim=1) >= top_p_L1 * total_L1
    is_found = is_reached.any(dim=1, keepdim=True) & (top_p_L1 < 1)
    first = is_reached.to(torch.uint8).argmax(dim=1, keepdim=True)
    raised = torch.maximum(ranked_LK.gather(1, first), threshold_L1)
    return torch.where(is_found, raised, threshold_L1)


def kept_threshold_ref(logits_LV: Tensor, filters: FilterColumns) -> Tensor:
    """Smallest logit that stays in each row, however wide the kept set is; at least the best token always stays.

    top-p finds its threshold in two histograms of probability over logits, the second one inside the bin where the
    share is reached: without sorting, and exact but for logits closer than 2e-6 to each other, which go together.

    Args:
        logits_LV: ``[L, V]`` float32, divided by the temperature.
        filters: Of the same rows.

    Returns:
        ``[L]`` float32.
    """
    top_k = min(filters.max_top_k, logits_LV.shape[1])
    ranked = logits_LV.topk(top_k, dim=1).values if top_k > 1 else logits_LV.amax(dim=1, keepdim=True)
    threshold = _rank_threshold(ranked, filters)
    if filters.top_p is not None:
        top_p = filters.top_p.unsqueeze(1)
        parts = [
            _share_threshold(*part)
            for part in zip(
                *(tensor.split(_ROWS_AT_ONCE) for tensor in (logits_LV, ranked[:, :1], threshold, top_p)), strict=True
            )
        ]
        threshold = torch.cat(parts)
    return threshold.squeeze(1)


def _share_threshold(logits_LV: Tensor, best_L1: Tensor, threshold_L1: Tensor, top_p_L1: Tensor) -> Tensor:
    below = (best_L1 - logits_LV).nan_to_num_(nan=_RANGE, posinf=_RANGE)
    weights = torch.where(logits_LV >= threshold_L1, (-below).exp_().double(), 0.0)
    coarse = (below * (_BINS / _RANGE)).long().clamp_(max=_BINS - 1)
    coarse_bin, before, wanted = _find_bin(coarse, weights, top_p_L1, None)
    is_inside = coarse == coarse_bin
    width = _RANGE / _BINS
    fine = ((below - coarse_bin * width) * (_BINS / width)).long().clamp_(min=0, max=_BINS - 1)
    fine_bin, _, _ = _find_bin(fine, torch.where(is_inside, weights, 0.0), wanted, before)
    is_last = is_inside & (fine == fine_bin) & (logits_LV >= threshold_L1)
    raised = torch.where(is_last, logits_LV, torch.inf).amin(dim=1, keepdim=True)
    # Rounding may leave the share unreached: then nothing more is cut off.
    return torch.where((top_p_L1 < 1) & (raised < torch.inf), torch.maximum(raised, threshold_L1), threshold_L1)


def _find_bin(
    bins_LV: Tensor, weights_LV: Tensor, share_L1: Tensor, before_L1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first bin at which the running weight reaches a share of the total (or, with ``before``, a given weight).

    Returns:
        ``bin [L, 1]``, the weight before it, and the weight wanted.
    """
    histogram = torch.zeros((bins_LV.shape[0], _BINS), dtype=torch.float64, device=bins_LV.device)
    running = histogram.scatter_add_(1, bins_LV, weights_LV).cumsum(dim=1)
    wanted = share_L1 * running[:, -1:] if before_L1 is None else share_L1
    running = running if before_L1 is None else running + before_L1
    is_reached = running >= wanted
    # Not reached because of rounding: the last bin that adds anything.
    index = torch.where(
        is_reached.any(dim=1, keepdim=True),
        is_reached.to(torch.uint8).argmax(dim=1, keepdim=True),
        (running < running[:, -1:]).sum(dim=1, keepdim=True).clamp_(max=_BINS - 1),
    )
    before = running.gather(1, (index - 1).clamp(min=0)).masked_fill_(index == 0, 0.0)
    return index, before, wanted

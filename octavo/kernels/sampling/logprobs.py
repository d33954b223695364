"""Log-probability and rank of a token, and the most likely tokens beside it. Knows no request and no output format."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.sampling.candidates import top_candidates_ref


def token_values_ref(
    logits_LV: Tensor, token_L: Tensor, num_top: int, named_LM: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the token that stands at each position, of the most likely ones, and of tokens asked for by name.

    Args:
        logits_LV: ``[L, V]`` float32.
        token_L: ``[L]`` int64.
        num_top: Most likely tokens wanted, 0 to V.
        named_LM: ``[L, M]`` int64 further ids, or None.
        normalise: Log-probabilities (log-softmax) instead of logits.

    Returns:
        ``token_ids [L, 1 + num_top + M]`` int64 and ``values`` float32 of the same shape, in the order named above,
        the most likely ones falling; ``rank [L]`` int64, 1 = no other token is more likely.
    """
    values_LV = logits_LV.log_softmax(dim=1) if normalise else logits_LV
    ids = [token_L.unsqueeze(1)]
    if num_top > 0:
        ids.append(top_candidates_ref(values_LV, num_top)[1])
    if named_LM is not None:
        ids.append(named_LM)
    token_ids = torch.cat(ids, dim=1)
    values = values_LV.gather(1, token_ids)
    rank = (values_LV > values[:, :1]).sum(dim=1) + 1
    return token_ids, values, rank

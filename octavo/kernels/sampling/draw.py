"""Draw one token per row from a distribution, as a pure function of (seed, output position).

Nothing is stored between draws, so a request gets the same text alone, in a batch, in chunks or after a preemption.
Knows no temperature and no filter: it gets probabilities. ``filters.py`` makes them.

Papers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (counter-based generators); Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (the mixing function used here, SplitMix64).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1
_BLOCK = 128
"""Probabilities summed at a time before the scan: a scan over blocks is V / 128 steps instead of V."""


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def mix_seed(seed: int) -> int:
    """The start of a request's stream, as int64: neighbouring seeds give unrelated streams."""
    z = (seed + _GAMMA) & _MASK_64
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK_64
    return _signed(z ^ (z >> 31))


def uniform_ref(stream_L: Tensor, position_L: Tensor) -> Tensor:
    """The ``position``-th uniform number of each stream.

    Args:
        stream_L: ``[L]`` int64 from ``mix_seed``.
        position_L: ``[L]`` int64, >= 0.

    Returns:
        ``[L]`` float64 in ``[0, 1)``, multiples of 2^-52.
    """
    # int64 arithmetic wraps like uint64; a right shift must be masked to be a logical one.
    z = (position_L + 1) * _signed(_GAMMA) + stream_L
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MULTIPLIER_1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MULTIPLIER_2)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 12) & ((1 << 52) - 1)).double() * 2.0**-52


def draw_ref(weights_LV: Tensor, uniform_L: Tensor) -> Tensor:
    """Invert the cumulative distribution in the order of token ids.

    Sums run in float64 over blocks of 128, then inside the chosen block, so tokens far below float32's resolution of
    1 keep their share and a token of weight 0 is never drawn.

    Args:
        weights_LV: ``[L, V]`` float32, >= 0, not necessarily normalised.
        uniform_L: ``[L]`` float64 in ``[0, 1)``.

    Returns:
        ``[L]`` int64 token ids; -1 where the weights sum to 0 or NaN.
    """
    num_rows, vocab_size = weights_LV.shape
    padding = -vocab_size % _BLOCK
    if padding:
        weights_LV = torch.nn.functional.pad(weights_LV, (0, padding))
    blocks = weights_LV.view(num_rows, -1, _BLOCK)
    block_cdf = blocks.sum(dim=2).double().cumsum(dim=1)
    total = block_cdf[:, -1:]
    target = uniform_L.unsqueeze(1) * total
    # right=True: the first block whose cumulative weight is above the target; it has a token of positive weight.
    block = torch.searchsorted(block_cdf, target, right=True).clamp_(max=block_cdf.shape[1] - 1)
    before = block_cdf.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inner = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    inner_cdf = inner.double().cumsum(dim=1)
    # Block sums are rounded to float32: keep the target inside the block, below its last positive weight.
    inside = torch.minimum((target - before).clamp_(min=0.0), inner_cdf[:, -1:] * (1.0 - 2.0**-52))
    offset = torch.searchsorted(inner_cdf, inside, right=True).clamp_(max=_BLOCK - 1)
    token = (block * _BLOCK + offset).squeeze(1)
    return torch.where(total.squeeze(1) > 0, token, -1)

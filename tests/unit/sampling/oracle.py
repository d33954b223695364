"""The sampler once more, for one row, in loops over plain Python and NumPy: what the batched one must agree with."""

from __future__ import annotations

import numpy as np

from octavo.messages import ResolvedSampling

MASK = (1 << 64) - 1


def splitmix(seed: int, index: int) -> float:
    """The ``index``-th number of the stream of ``seed``: SplitMix64 started at a mixed seed, 52 bits."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    start = mix((seed + gamma) & MASK)
    return (mix((start + (index + 1) * gamma) & MASK) >> 12) * 2.0**-52


def masked(logits: np.ndarray, s: ResolvedSampling, prompt: list[int], output: list[int]) -> np.ndarray:
    """Logits after masks and penalties, float64."""
    x = logits.astype(np.float64)
    if s.allowed_token_ids:
        forbidden = np.ones(len(x), bool)
        forbidden[s.allowed_token_ids] = False
        x[forbidden] = -np.inf
    for token, bias in s.logit_bias.items():
        x[token] += bias
    for *head, last in s.bad_words_token_ids:
        if len(output) >= len(head) and output[len(output) - len(head) :] == head:
            x[last] = -np.inf
    if len(output) < s.min_tokens:
        x[[*s.eos_token_ids, *s.stop_token_ids]] = -np.inf
    for token in range(len(x)):
        count = output.count(token)
        if s.repetition_penalty != 1 and (count or token in prompt):
            x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        x[token] -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    return x


def distribution(x: np.ndarray, s: ResolvedSampling) -> np.ndarray:
    """Probabilities after temperature and filters; equal logits stay or go together."""
    x = x / s.temperature
    p = np.exp(x - x.max())
    keep = p >= s.min_p * p.max()
    if s.top_k:
        keep &= x >= np.sort(x)[::-1][min(s.top_k, len(x)) - 1]
    if s.top_p < 1:
        kept = np.sort(x[keep])[::-1]
        weights = np.exp(kept - kept[0])
        reached = np.flatnonzero(np.cumsum(weights) >= s.top_p * weights.sum())
        keep &= x >= (kept[reached[0]] if len(reached) else kept[-1])
    p = np.where(keep, p, 0.0)
    return p / p.sum()


def draw(p: np.ndarray, u: float) -> tuple[int, float]:
    """Token, and how far ``u`` was from the nearest border between two tokens."""
    cdf = np.cumsum(p) / p.sum()
    return int(np.searchsorted(cdf, u, side="right")), float(np.abs(cdf - u).min())

"""Attention of encoders: both ways in which a step is computed equal plain softmax, text by text.

Red when: a text sees another one of its step, a window is too wide or too narrow, or padding reaches a result.
"""

from __future__ import annotations

import pytest
import torch

from octavo.attention.backend import AttentionSpec
from octavo.attention.encoder import EncoderBackend, pad
from octavo.attention.registry import choose_backend
from octavo.batch import StepShape
from octavo.errors import ConfigError

LENGTHS = (5, 1, 9, 3)


def make_spec(num_kv_heads: int, window: int | None, *, is_bidirectional: bool = True) -> AttentionSpec:
    return AttentionSpec(
        4, num_kv_heads, 8, 16, torch.float32, torch.float32, 0.3, sliding_window=window,
        is_bidirectional=is_bidirectional,
    )  # fmt: skip


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One text: ``[n, H, D]`` and ``[n, G, D]``."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    if window is not None:
        positions = torch.arange(len(q))
        scores = scores.masked_fill((positions[:, None] - positions).abs() > window, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_each_text_for_itself(num_kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    q = torch.randn(total, 4, 8, generator=generator)
    k, v = (torch.randn(total, num_kv_heads, 8, generator=generator) for _ in range(2))
    parts = zip(*(each.split(LENGTHS) for each in (q, k, v)), strict=True)
    want = torch.cat([plain(*part, window) for part in parts])
    backend = EncoderBackend(make_spec(num_kv_heads, window))
    step = StepShape(total, len(LENGTHS), max(LENGTHS), max(LENGTHS), LENGTHS, LENGTHS)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    meta = backend.plan(step, starts, lens, torch.zeros(4, 1, dtype=torch.int32), torch.arange(total))
    assert meta.padded is None
    out = torch.full_like(q, float("nan"))
    backend.attend(q, k, v, torch.empty(0), meta, out)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    meta.padded = pad(step, starts, lens, window)  # as on a GPU
    out = torch.full_like(q, float("nan"))
    backend.attend(q, k, v, torch.empty(0), meta, out)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_each_direction_gets_its_backend() -> None:
    backend, _ = choose_backend("auto", make_spec(4, None), "cpu")
    assert backend is EncoderBackend
    backend, _ = choose_backend("auto", make_spec(4, None, is_bidirectional=False), "cpu")
    assert backend is not EncoderBackend
    with pytest.raises(ConfigError, match="this is an encoder"):
        choose_backend("torch_sdpa", make_spec(4, None), "cpu")
    with pytest.raises(ConfigError, match="it is for encoders"):
        choose_backend("encoder_sdpa", make_spec(4, None, is_bidirectional=False), "cpu")

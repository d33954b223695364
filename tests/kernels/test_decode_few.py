"""Decode attention of few requests, which prepares its heads itself, against plain torch for both.

Runs on a GPU and in Triton's interpreter. Red when a key or value is written to a wrong slot, by nobody or with other
roundings, and when a token does not see itself.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.kernels.attention.decode_few import decode_few, suits
from octavo.kernels.attention.reference import paged_attention_ref
from octavo.kernels.rope import norm_rotate_write_ref

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LENGTHS = [1, 16, 17, 129, 500, 0]
"""The last request is empty, as those are that fill a recorded step."""


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotary", "page", "has_norm", "window", "softcap", "has_sinks"),
    [
        (4, 2, 64, 64, 16, True, None, None, False),
        (3, 1, 80, 32, 64, False, None, None, True),
        (2, 2, 128, 128, 64, True, 40, None, False),
        (8, 2, 128, 0, 32, False, None, 20.0, False),
        (2, 1, 256, 256, 48, False, 300, None, False),
    ],
)
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_inside_or_before_is_the_same(
    heads: int, kv_heads: int, size: int, rotary: int, page: int, has_norm: bool, window: int | None,
    softcap: float | None, has_sinks: bool, dtype: torch.dtype,
    parts: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, blocks = len(LENGTHS), sum(-(-length // page) for length in LENGTHS) + 1
    qkv = normal(tokens, (heads + 2 * kv_heads) * size).to(DEVICE, dtype)
    cache = normal(blocks, 2, kv_heads, page, size).to(DEVICE, dtype)
    blocks_of = torch.zeros(tokens, -(-max(LENGTHS) // page) + 1, dtype=torch.int32)
    ids = iter(torch.randperm(blocks - 1, generator=generator) + 1)
    for row, length in enumerate(LENGTHS):
        for block in range(-(-length // page)):
            blocks_of[row, block] = next(ids)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    last = (lengths - 1).clamp(min=0).long()
    slots = blocks_of.gather(1, (last // page)[:, None])[:, 0].long() * page + last % page
    slots = torch.where(lengths > 0, slots, -1)
    # What is in the new slots must not matter.
    for slot in slots[lengths > 0].tolist():
        cache[slot // page, :, :, slot % page] = float("nan")
    norms = (normal(size).to(DEVICE, dtype), normal(size).to(DEVICE, dtype), 1e-5) if has_norm else None
    rotations = torch.polar(torch.ones(512, rotary // 2), normal(512, rotary // 2) * 3).to(DEVICE)
    blocks_of, lengths, positions, slots = blocks_of.to(DEVICE), lengths.to(DEVICE), last.to(DEVICE), slots.to(DEVICE)
    start = torch.arange(tokens + 1, dtype=torch.int32, device=DEVICE)

    written, prepared = cache.clone(), qkv.clone()
    views = (written[:, 0].transpose(1, 2), written[:, 1].transpose(1, 2))
    norm_rotate_write_ref(prepared, heads, kv_heads, norms, rotations, positions, *views, slots)
    by_head = prepared.view(tokens, heads + 2 * kv_heads, size)[:, :heads]
    scale = size**-0.5
    sinks = normal(heads).to(DEVICE) * 3 + 1 if has_sinks else None
    expected = paged_attention_ref(
        by_head, written, blocks_of, start, lengths, scale=scale, window=window, softcap=softcap, sinks=sinks
    )
    stale = cache.clone()
    for row, length in enumerate(LENGTHS):
        # Blocks before the window are somebody else's by now.
        for block in range(max(0, length - (window or length)) // page):
            stale[blocks_of[row, block]] = float("nan")
    out = torch.zeros(tokens, heads, size, dtype=dtype, device=DEVICE)
    for _ in range(2):  # the second one finds the counters as the first one left them
        decode_few(
            qkv, stale, blocks_of, lengths, out, norms=norms, table=torch.view_as_real(rotations), positions=positions,
            slot_mapping=slots, scale=scale, window=window, softcap=softcap, sinks=sinks, parts=parts,
        )  # fmt: skip
    real = slice(0, tokens - 1)
    torch.testing.assert_close(out[real].float(), expected[real].float(), atol=TOLERANCE[dtype], rtol=0)
    assert not out[tokens - 1].any(), "an empty request was written"
    slots = slots[lengths > 0]
    for side in (0, 1):
        new, expected_new = (each[:, side].transpose(1, 2).flatten(0, 1)[slots] for each in (stale, written))
        torch.testing.assert_close(new, expected_new, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_dry_run_writes_no_cache() -> None:
    """Warming up runs a step without keys and values of its own, before there is a cache."""
    qkv = torch.randn(2, 4 * 64, device=DEVICE).half()
    cache = torch.zeros(1, 2, 1, 16, 64, device=DEVICE).half()
    lengths = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    nowhere = torch.full((2,), -1, device=DEVICE)
    out = torch.zeros(2, 2, 64, device=DEVICE).half()
    decode_few(
        qkv, cache, torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), lengths, out, norms=None,
        table=torch.zeros(4, 0, 2, device=DEVICE), positions=torch.zeros_like(nowhere), slot_mapping=nowhere,
        scale=1.0, window=None, softcap=None,
    )  # fmt: skip
    assert not cache.any()
    # One token sees its own value alone.
    torch.testing.assert_close(out[0], qkv[0, 3 * 64 :].expand(2, -1))


def test_many_requests_and_wide_groups_go_the_other_way() -> None:
    assert suits(4, 32, 8, 128) and suits(1, 8, 1, 128)
    assert not suits(5, 32, 8, 128)
    assert not suits(1, 8, 1, 256) and not suits(1, 71, 1, 64), "sums of all parts do not fit into registers"
    assert not suits(4, 2048, 2048, 64), "counters"

"""The Triton attention backend against plain torch, on random paged batches.

Runs on a GPU (``pytest -m gpu``) and, with smaller shapes, in Triton's interpreter (``TRITON_INTERPRET=1``); skipped
where there is neither. Red when a kernel reads a wrong page, key, head or mask, or writes a slot it must not.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.attention.backend import AttentionSpec
from octavo.attention.triton import TritonBackend
from octavo.batch import StepShape
from octavo.kernels.attention.decode import make_work_list
from octavo.kernels.attention.reference import paged_attention_ref

# Triton 3.6's interpreter on NumPy 2.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# The interpreter computes bfloat16 products wrongly (Triton 3.6), and takes a second for a step.
DTYPES = [torch.float32] if IS_INTERPRETED else list(TOLERANCE)


def run_step(
    spec: AttentionSpec, lens: list[tuple[int, int]], seed: int = 0, num_empty: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of requests ``(queries, tokens in all)`` with scattered blocks: result, reference, padding rows.

    With ``num_empty`` it is filled up with so many requests without tokens, and planned as a step to be recorded is.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    page = spec.block_size
    query_lens = [query for query, _ in lens]
    seq_lens = [total for _, total in lens]
    needed = [-(-total // page) for total in seq_lens]
    num_blocks = sum(needed) + 4
    ids = list(range(1, num_blocks))
    rng.shuffle(ids)
    table = torch.zeros((len(lens), max(needed) + 1), dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([ids.pop() for _ in range(count)])
    backend = TritonBackend(spec)
    # Unwritten memory may hold NaN: whatever reads beyond a length shows.
    cache = torch.full(backend.kv_shape(num_blocks), float("nan"), dtype=spec.kv_dtype)
    flat_kv = [torch.randn(total, 2, spec.num_kv_heads, spec.head_dim).to(spec.kv_dtype) for total in seq_lens]
    slots: list[int] = []
    for row, (query, total) in enumerate(lens):
        for position in range(total):
            block, offset = int(table[row, position // page]), position % page
            if position < total - query:
                cache[block, :, :, offset] = flat_kv[row][position]
            else:
                slots.append(block * page + offset)
    padding = 3
    new = torch.cat([kv[total - query :] for kv, (query, total) in zip(flat_kv, lens, strict=True)])
    pad = torch.full((padding, *new.shape[1:]), float("nan"), dtype=new.dtype)
    new = torch.cat([new, pad]).to(DEVICE)
    q = torch.randn(len(new), spec.num_heads, spec.head_dim).to(spec.dtype).to(DEVICE)
    slot_mapping = torch.tensor(slots + [-1] * padding, device=DEVICE)
    start = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    lens_tensor = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    left = cache.clone()
    for row, (query, total) in enumerate(lens):
        # Blocks before the window are somebody else's by now.
        for column in range(max(0, total - query + 1 - (spec.sliding_window or total)) // page):
            left[int(table[row, column])] = float("nan")
    table, cache, left = table.to(DEVICE), cache.to(DEVICE), left.to(DEVICE)
    step = StepShape(
        num_tokens=sum(query_lens), num_reqs=len(lens), max_query_len=max(query_lens), max_seq_len=max(seq_lens),
        query_lens=tuple(query_lens), seq_lens=tuple(seq_lens),
    )  # fmt: skip
    if num_empty:
        tokens, reqs = len(new), len(lens) + num_empty
        start = torch.cat([start, start[-1:].expand(num_empty)])
        lens_tensor = torch.cat([lens_tensor, lens_tensor.new_zeros(num_empty)])
        table = torch.cat([table, table.new_zeros(num_empty, table.shape[1])])
        step = StepShape(tokens, reqs, tokens, 4096, (tokens,) * reqs, (4096,) * reqs, is_bound=True)
    meta = backend.plan(step, start, lens_tensor, table, slot_mapping)
    out = torch.full_like(q, 7.0)
    for each in (cache, left):
        backend.write(new[:, 0], new[:, 1], each, meta)
    sinks = torch.randn(spec.num_heads).to(DEVICE) * 3 + 1 if spec.has_sinks else None
    backend.attend(q, new[:, 0], new[:, 1], left, meta, out, sinks)
    expected = paged_attention_ref(
        q, cache, table, start, lens_tensor, scale=spec.scale, window=spec.sliding_window, softcap=spec.logit_softcap,
        sinks=sinks,
    )  # fmt: skip
    count = sum(query_lens)
    return out[:count].float(), expected[:count], out[count:].float()


def make_spec(dtype: torch.dtype, **changes: object) -> AttentionSpec:
    fields: dict[str, object] = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": dtype, "kv_dtype": dtype,
        "scale": 0.125,
    }  # fmt: skip
    return AttentionSpec(**(fields | changes))  # type: ignore[arg-type]


BATCHES = {
    "decodes": [(1, 1), (1, 15), (1, 16), (1, 17), (1, 300), (1, 700)],
    "one long decode": [(1, 2000)],
    "prefills": [(2, 2), (33, 33), (130, 130), (16, 64), (65, 200)],
    "mixed": [(1, 40), (50, 90), (1, 333), (7, 7), (1, 1), (3, 500)],
}
SPECS: dict[str, dict[str, object]] = {
    "small": {},
    "page 48": {"block_size": 48},
    "page 64": {"block_size": 64},
    "page 128, head 128": {"block_size": 128, "head_dim": 128, "num_heads": 8},
    "page 32, no groups": {"block_size": 32, "num_kv_heads": 4},
    "odd group, head 80": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 80, "block_size": 64},
    "head 256": {"head_dim": 256, "block_size": 64, "num_heads": 2, "num_kv_heads": 1},
    "window": {"sliding_window": 33, "block_size": 64},
    "window on a border": {"sliding_window": 64, "block_size": 16},
    "softcap": {"logit_softcap": 5.0, "block_size": 64},
    "sinks": {"has_sinks": True, "block_size": 64},
    "window and sinks": {"has_sinks": True, "sliding_window": 33, "num_heads": 16},
    "window and softcap": {"sliding_window": 100, "logit_softcap": 2.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("spec", SPECS)
def test_equals_reference(spec: str, batch: str, dtype: torch.dtype) -> None:
    result, expected, _ = run_step(make_spec(dtype, **SPECS[spec]), BATCHES[batch])
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("spec", ["small", "page 128, head 128"])
def test_half_precision(spec: str) -> None:
    out, expected, _ = run_step(make_spec(torch.float16, **SPECS[spec]), BATCHES["mixed"])
    torch.testing.assert_close(out, expected, atol=TOLERANCE[torch.float16], rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # tiles without tokens
def test_a_step_planned_from_bounds() -> None:
    out, expected, padding = run_step(make_spec(torch.float32, block_size=64), BATCHES["mixed"], num_empty=4)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    assert (padding == 7.0).all()


def test_padding_tokens_are_left_alone() -> None:
    _, _, padding = run_step(make_spec(torch.float32), BATCHES["mixed"])
    assert (padding == 7.0).all()


@pytest.mark.parametrize("window", [None, 100])
def test_work_covers_each_history_once_and_begins_with_the_longest(window: int | None) -> None:
    lens = [70, 1, 900, 0, 330, 64, 901, 5000, 12]
    query_lens = [1, 1, 1, 1, 40, 1, 1, 1, 1]  # the fifth is a prompt, the fourth the dummy
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
    work = make_work_list(starts, torch.tensor(lens, dtype=torch.int32, device=DEVICE), 2, 4, 32, window)
    items = work.items[: int(work.num_items)].tolist()
    for request, length in enumerate(lens):
        parts = sorted((low, high) for owner, _, low, high, *_ in items if owner == request)
        if length == 0 or query_lens[request] > 1:
            assert not parts
            continue
        seen = 0 if window is None else max(0, length - window)
        assert parts[0][0] <= seen and parts[0][0] % 32 == 0 and parts[-1][1] == length
        assert all(one[1] == other[0] for one, other in zip(parts, parts[1:], strict=False))
        assert all(item[1] == int(starts[request]) and item[5] == length for item in items if item[0] == request)
    # Lengths of a class, a fifteenth of the longest part, may come in any order; they are rounded up to tiles of 32.
    sizes = {request: max(high - low for owner, _, low, high, *_ in items if owner == request) for request, *_ in items}
    order = [sizes[item[0]] for item in items]
    step = (max(order) + 31) / 15 + 32
    assert all(later <= earlier + step for earlier, later in zip(order, order[1:], strict=False))

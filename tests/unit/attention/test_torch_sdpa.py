"""The torch backend against a dense reference, over random paged batches.

Red when: a key is missed or seen that should not be (window, causality, block order), a slot is written wrongly, a
padding slot is written, or a scale, head group or softcap is applied wrongly.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from octavo.attention.backend import AttentionSpec
from octavo.attention.cpu_paged import CpuPagedBackend
from octavo.attention.registry import BACKENDS, choose_backend
from octavo.attention.torch_sdpa import TorchSdpaBackend
from octavo.batch import StepShape
from octavo.errors import ConfigError

SPEC = AttentionSpec(
    num_heads=6, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, kv_dtype=torch.float32, scale=0.2
)


def dense(q, k, v, spec: AttentionSpec, sinks=None):
    """The last ``len(q)`` positions of a sequence attend over all of it, written as plainly as possible."""
    num_queries, num_keys = len(q), len(k)
    groups = spec.num_heads // spec.num_kv_heads
    out = torch.empty_like(q)
    for head in range(spec.num_heads):
        scores = q[:, head] @ k[:, head // groups].T * spec.scale
        if spec.logit_softcap is not None:
            scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
        for row in range(num_queries):
            position = num_keys - num_queries + row
            first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            scores[row, :first] = float("-inf")
            scores[row, position + 1 :] = float("-inf")
        if sinks is not None:
            scores = torch.cat((scores, sinks[head].expand(num_queries, 1)), 1)
        out[:, head] = scores.softmax(-1)[:, :num_keys] @ v[:, head // groups]
    return out


class GatheredBackend(TorchSdpaBackend):
    """What TORCH_SDPA does on a GPU, made to run here."""

    def plan(self, step, query_start_loc, seq_lens, block_table, slot_mapping):
        return self._gathered.plan(step, block_table, slot_mapping)


def check_batch(
    spec: AttentionSpec,
    work: list[tuple[int, int]],
    *,
    scattered: bool,
    padding: int = 0,
    seed: int = 0,
):
    """Run one step where request i has ``work[i] = (tokens in cache, new tokens)``; compare every output."""
    for backend_class in (TorchSdpaBackend, CpuPagedBackend, GatheredBackend):
        if backend_class.unsupported(spec, "cpu") is None:
            backend = backend_class(spec)
            check_backend(backend, spec, work, scattered=scattered, padding=padding, seed=seed, is_stale=True)


def check_backend(
    backend, spec, work, *, scattered, padding=0, seed=0, device="cpu", fill=float("nan"), atol=2e-5, rtol=1e-4,
    is_stale=False,
):  # fmt: skip
    """With ``is_stale``, tables name a block of somebody else, full of NaN, for what lies before the window."""
    generator = torch.Generator().manual_seed(seed)

    def random_tensor(*shape):
        return torch.randn(*shape, generator=generator).to(spec.dtype).float()

    size = spec.block_size
    blocks_needed = [-(-(past + new) // size) for past, new in work]
    num_blocks = sum(blocks_needed) + 3
    ids = torch.arange(1, num_blocks)
    if scattered:
        ids = ids[torch.randperm(len(ids), generator=generator)]
    tables = torch.zeros(len(work), max(blocks_needed) + 1, dtype=torch.int32)
    for row, blocks in enumerate(ids[: sum(blocks_needed)].split(blocks_needed)):
        tables[row, : len(blocks)] = blocks
    cache = torch.full(backend.kv_shape(num_blocks), fill, dtype=spec.kv_dtype, device=device)
    keys, values, queries, slots = [], [], [], []
    past_k, past_v, past_slots = [], [], []
    for row, (past, new) in enumerate(work):
        k = random_tensor(past + new, spec.num_kv_heads, spec.head_dim).to(spec.kv_dtype).float()
        v = random_tensor(past + new, spec.num_kv_heads, spec.head_dim).to(spec.kv_dtype).float()
        positions = torch.arange(past + new)
        slot = tables[row, positions // size].long() * size + positions % size
        keys.append(k), values.append(v), slots.append(slot[past:])
        past_k.append(k[:past]), past_v.append(v[:past]), past_slots.append(slot[:past])
        queries.append(random_tensor(new, spec.num_heads, spec.head_dim))
    # The history is written by the backend itself, as earlier steps would have.
    write(backend, spec.num_heads, torch.cat(past_k), torch.cat(past_v), torch.cat(past_slots), cache)
    new_tokens = [new for _, new in work]
    seq_lens = [past + new for past, new in work]
    start_loc = torch.tensor([0, *new_tokens]).cumsum(0).int()
    mapping = torch.cat([*slots, torch.full((padding,), -1)])
    step = StepShape(sum(new_tokens), len(work), max(new_tokens), max(seq_lens), tuple(new_tokens), tuple(seq_lens))
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    if is_stale and spec.sliding_window is not None:
        for row, (past, _) in enumerate(work):
            tables[row, : max(0, past - spec.sliding_window + 1) // size] = ids[-1]
    meta = backend.plan(step, start_loc.to(device), lens.to(device), tables.to(device), mapping.to(device))
    pad = torch.zeros(padding, spec.num_kv_heads, spec.head_dim)
    q = torch.cat([*queries, torch.zeros(padding, spec.num_heads, spec.head_dim)])
    k = torch.cat([*(k[past:] for k, (past, _) in zip(keys, work, strict=True)), pad])
    v = torch.cat([*(v[past:] for v, (past, _) in zip(values, work, strict=True)), pad])
    q, k, v = (each.to(device, spec.dtype) for each in (q, k, v))
    out = torch.full_like(q, float("nan"))
    cache_before = cache.clone()
    backend.write(k, v, cache, meta)
    sinks = torch.randn(spec.num_heads, generator=generator) * 3 if spec.has_sinks else None
    if sinks is None:
        backend.attend(q, k, v, cache, meta, out)
    else:
        backend.attend(q, k, v, cache, meta, out, sinks.to(device))
    start = 0
    for row, (_, new) in enumerate(work):
        extra = () if sinks is None else (sinks,)
        expected = dense(queries[row], keys[row], values[row], spec, *extra)
        torch.testing.assert_close(out[start : start + new].cpu().float(), expected, atol=atol, rtol=rtol)
        start += new
    # New slots were NaN or zero: exactly their values have changed, nothing else.
    is_same = (cache == cache_before) | (cache.isnan() & cache_before.isnan())
    assert int((~is_same).sum()) == sum(new_tokens) * 2 * spec.num_kv_heads * spec.head_dim


def write(backend, num_heads, k, v, slots, cache):
    """One step that only stores: as many single-token requests as there are tokens."""
    count = len(slots)
    if not count:
        return
    ones = (1,) * count
    device, spec = cache.device, backend._spec if hasattr(backend, "_spec") else SPEC
    slots, k, v = slots.to(device), k.to(device, spec.dtype), v.to(device, spec.dtype)
    tables = (slots // spec.block_size).int()[:, None]
    step = StepShape(count, count, 1, 1, ones, ones)
    starts, lens = torch.arange(count + 1).int().to(device), torch.ones(count).int().to(device)
    meta = backend.plan(step, starts, lens, tables, slots)
    q = torch.zeros(count, num_heads, k.shape[-1], dtype=spec.dtype, device=device)
    backend.write(k, v, cache, meta)
    backend.attend(q, k, v, cache, meta, torch.empty_like(q))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_random_mixed_batches(scattered, window, softcap):
    rng = random.Random(7)
    spec = replace(SPEC, sliding_window=window, logit_softcap=softcap)
    for seed in range(3):
        work = [(rng.choice([0, 0, 1, 15, 16, 17, 63, 150]), rng.choice([1, 1, 1, 2, 16, 33])) for _ in range(6)]
        check_batch(spec, work, scattered=scattered, padding=rng.choice([0, 3]), seed=seed)


@pytest.mark.parametrize("window", [None, 40])
def test_sinks_take_their_part_of_the_weight(window):
    spec = replace(SPEC, has_sinks=True, sliding_window=window)
    check_batch(spec, [(0, 1), (0, 33), (150, 1), (63, 16), (300, 1), (17, 2)], scattered=True, padding=3)


def test_a_backend_without_sinks_refuses_such_layers():
    with pytest.raises(ConfigError, match="no attention sinks"):
        choose_backend("FLEX_ATTENTION", replace(SPEC, has_sinks=True), "cpu")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim):
    check_batch(replace(SPEC, head_dim=head_dim), [(20, 1), (0, 19), (33, 5)], scattered=True)


def test_chunks_longer_than_a_masked_span():
    """A long chunk with history is cut into several spans; window and causality must hold across the cuts."""
    check_batch(SPEC, [(37, 600)], scattered=False)
    check_batch(replace(SPEC, sliding_window=100), [(0, 700)], scattered=True)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (7, 1)])
def test_head_groups(heads):
    spec = replace(SPEC, num_heads=heads[0], num_kv_heads=heads[1])
    check_batch(spec, [(0, 30)], scattered=True)
    check_batch(spec, [(0, 1), (0, 2)], scattered=False)


def test_many_decoding_requests():
    """Batched decode paths see rows of very different lengths."""
    lens = [0, 1, 2, 15, 16, 17, 31, 100, 257, 5, 5, 5, 64, 90, 33, 34]
    for scattered in (False, True):
        check_batch(SPEC, [(past, 1) for past in lens], scattered=scattered)


def test_a_rounded_cache_is_read_back():
    """The cache may have another dtype than the activations; histories that fit it exactly give exact answers."""
    for kv_dtype in (torch.bfloat16, torch.float16):
        check_batch(replace(SPEC, kv_dtype=kv_dtype), [(40, 1), (17, 9), (0, 12)], scattered=True)


def test_choice_by_name_alias_and_import_path():
    for name in ("TORCH_SDPA", "torch_native", "octavo.attention.torch_sdpa:TorchSdpaBackend"):
        backend, reason = choose_backend(name, SPEC, "cpu")
        assert backend is TorchSdpaBackend
        assert reason
    for name in ("auto", "CPU_ATTN"):
        assert choose_backend(name, SPEC, "cpu")[0] is CpuPagedBackend
    softcapped = replace(SPEC, logit_softcap=30.0)
    assert choose_backend("auto", softcapped, "cpu")[0] is TorchSdpaBackend


def test_errors_list_every_candidate_with_its_reason():
    with pytest.raises(ConfigError) as caught:
        choose_backend("auto", replace(SPEC, dtype=torch.float64), "cpu")
    for name in [*BACKENDS.names(), *BACKENDS.absent]:
        assert name in caught.value.message
    assert "dtype torch.float64" in caught.value.message
    with pytest.raises(ConfigError, match="runs on the CPU, not on cuda"):
        choose_backend("CPU_PAGED", SPEC, "cuda")
    with pytest.raises(ConfigError, match="NONSENSE.*not known.*TORCH_SDPA"):
        choose_backend("nonsense", SPEC, "cpu")
    with pytest.raises(ConfigError, match="float64"):
        choose_backend("TORCH_SDPA", replace(SPEC, dtype=torch.float64), "cpu")

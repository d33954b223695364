"""The worker on a tiny dummy model: order of steps, deferred sampling, memory numbers. Turns red when a step overtakes
one that waits for its mask, when a failure does not reach its future, or when the memory ledger changes a term."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.attention.backend import AttentionSpec
from octavo.config.engine import EngineConfig
from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import (
    CacheConfig,
    DeviceConfig,
    FrontendConfig,
    LoadConfig,
    ParallelConfig,
    SchedulerConfig,
)
from octavo.device.device import DeviceMemory
from octavo.errors import ConfigError
from octavo.kv_spec import KVKind
from octavo.messages import NewRow, ResolvedSampling, SchedulerOutput
from octavo.worker.memory import bound_activation_bytes, bound_kv_bytes, group_layers, make_kv_spec, max_logits_rows
from octavo.worker.worker import Worker
from tests.unit.worker.harness import done

GIB = 2**30
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    layer_windows=(None, 16, 16, None),
)
CONFIG = EngineConfig(
    model=MODEL,
    load=LoadConfig("tiny", "", "dummy", None, 0),
    device=DeviceConfig("cpu", "float32", "auto", "none", 1, True, 1),
    cache=CacheConfig(16, "float32", True, "sha256", 0.9, None, None),
    scheduler=SchedulerConfig(128, 4, 64, True, 0, "fcfs", 100, 10_000),
    parallel=ParallelConfig(),
    frontend=FrontendConfig(("tiny",), "", True, None, 20, "raw_logprobs", {}, 0),
)
PROMPT = [5, 17, 3, 88, 41]


@pytest.fixture(autouse=True)
def keep_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_worker(config: EngineConfig = CONFIG) -> Worker:
    worker = Worker(config)
    worker.load()
    worker.allocate(40)
    return worker


def new_row(row: int = 0, **fields: object) -> NewRow:
    params = ResolvedSampling(**{"max_tokens": 50, "seed": 1, "temperature": 0.0, **fields})  # type: ignore[arg-type]
    blocks = [[1 + 4 * row, 2 + 4 * row], [20 + 4 * row, 21 + 4 * row]]
    return NewRow(row, PROMPT, len(PROMPT), 0, params, blocks)


def plan(step_id: int, num_tokens: int = 1, new: list[NewRow] | None = None, **fields: object) -> SchedulerOutput:
    return SchedulerOutput(step_id, [], new or [], [0], [num_tokens], **fields)  # type: ignore[arg-type]


def run_text(worker: Worker, steps: int) -> list[int]:
    text = done(worker.forward(plan(0, len(PROMPT), [new_row()]), None)).token_ids[0]
    for step in range(1, steps):
        text = text + done(worker.forward(plan(step), None)).token_ids[0]
    return text


def test_deferred_steps_wait_for_their_masks_in_order() -> None:
    expected = run_text(make_worker(), 5)
    worker = make_worker()
    everything = torch.full((1, 3), -1, dtype=torch.int32).numpy().tobytes()
    first = worker.forward(plan(0, len(PROMPT), [new_row()], defer_sampling=True), None)
    second = worker.forward(plan(1), None)
    third = worker.forward(plan(2, defer_sampling=True), None)
    assert not any(future.done() for future in (first, second, third))
    with pytest.raises(AssertionError, match="before 2"):
        worker.sample(2, None)
    worker.sample(0, everything)
    fourth = worker.forward(plan(3), None)
    assert first.done() and second.done() and not third.done() and not fourth.done()
    worker.sample(2, None)
    last = worker.forward(plan(4, defer_sampling=True), everything)
    assert [done(future).token_ids[0][0] for future in (first, second, third, fourth, last)] == expected
    with pytest.raises(AssertionError, match="not waiting"):
        worker.sample(5, None)


def test_a_late_mask_decides_the_token() -> None:
    worker = make_worker()
    future = worker.forward(plan(0, len(PROMPT), [new_row()], defer_sampling=True), None)
    mask = torch.zeros(1, 3, dtype=torch.int32)
    mask[0, 2] = 1 << 7
    worker.sample(0, mask.numpy().tobytes())
    assert done(future).token_ids == [[71]]


def test_what_a_step_raises_reaches_its_future_and_the_next_step_runs() -> None:
    worker = make_worker()
    bad = NewRow(0, PROMPT, len(PROMPT), 0, new_row().sampling, [[1]])  # blocks for one group of two
    future = worker.forward(plan(0, len(PROMPT), [bad]), None)
    assert isinstance(future.exception(), AssertionError)


def test_warming_up_leaves_no_trace() -> None:
    expected = run_text(make_worker(), 4)
    worker = make_worker()
    worker.warm_up()
    caches = [layer._cache for layer in worker._context.attention_layers]
    assert all(cache is not None and not cache.any() for cache in caches)
    assert run_text(worker, 4) == expected


def test_layers_of_one_group_share_tables_and_tensors_are_shared_between_groups() -> None:
    worker = Worker(CONFIG)
    spec = worker.load().kv_spec
    assert [(group.kind, group.layer_indices) for group in spec.groups] == [
        (KVKind.FULL, (0, 3)),
        (KVKind.SLIDING_WINDOW, (1, 2)),
    ]
    worker.allocate(10)
    caches = [layer._cache for layer in worker._context.attention_layers]
    pointers = [cache.data_ptr() for cache in caches if cache is not None]
    assert pointers[0] == pointers[1] and pointers[3] == pointers[2] and pointers[0] != pointers[2]
    assert sum(cache.nbytes for cache in caches if cache is not None) == 2 * 10 * spec.bytes_per_block


def test_weights_count_shared_storage_once() -> None:
    report = Worker(CONFIG).load()
    qkv, out, ffn, norms = 32 * 64, 32 * 32, 3 * 32 * 48, 2 * 32
    weights = 4 * (96 * 32 + 4 * (qkv + out + ffn + norms) + 32)
    # Position tables belong to the model as well.
    assert weights <= report.weights_bytes <= weights + 128 * 8 * 4 * 4


def test_the_kv_ledger() -> None:
    cache = CONFIG.cache
    memory = DeviceMemory(total=100 * GIB, free=60 * GIB)
    # Free memory decides: 60 - 5 of work - 0.5 of reserve.
    assert bound_kv_bytes(memory, cache, 10 * GIB, 5 * GIB) == int(54.5 * GIB)
    # The ceiling decides: 30 % of 100 less 10 of weights and 5 of work.
    assert bound_kv_bytes(memory, replace(cache, memory_utilization=0.3), 10 * GIB, 5 * GIB) == 15 * GIB
    # Given outright: only what is free counts.
    outright = replace(cache, memory_utilization=0.3, kv_cache_memory_bytes=GIB)
    assert bound_kv_bytes(memory, outright, 10 * GIB, 5 * GIB) == 55 * GIB
    assert bound_kv_bytes(DeviceMemory(GIB, 0), cache, 10 * GIB, GIB) == 0


def test_the_ledger_names_what_is_taken_and_what_is_kept_free(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(CONFIG)
    worker.load()
    worker._at_start = DeviceMemory(total=100 * GIB, free=90 * GIB)
    worker._device.memory = lambda: DeviceMemory(total=100 * GIB, free=60 * GIB)  # type: ignore[method-assign]
    worker._ledger = {"weights": 10 * GIB, "KV cache": 19 * GIB}
    worker._kept = {"activations at most": 5 * GIB, "reserve": GIB // 2}
    with caplog.at_level("INFO", logger="octavo"):
        worker._log_ledger()
    assert caplog.messages[-1] == (
        "memory in GiB: weights 10.00, KV cache 19.00; together 29.00, the device says 30.00 (-1.0 % of its 100.0); "
        "60.00 free for activations at most 5.00, reserve 0.50"
    )


def test_working_memory_grows_with_the_step_but_not_with_the_prompts_logits() -> None:
    limits = CONFIG.scheduler

    def bound(**fields: int) -> int:
        return bound_activation_bytes(MODEL, replace(limits, **fields), 4, prompt_piece=128)

    assert bound(max_num_batched_tokens=8192) - bound(max_num_batched_tokens=4096) == pytest.approx(
        4096 * (4 * (6 * 32 + 2 * 64 + 32) + 2 * 96 * 4 + 64)
    )
    assert max_logits_rows(vocab_size=150_000, max_num_seqs=1024) * 150_000 * 4 <= 64 * 2**20
    assert max_logits_rows(vocab_size=10**9, max_num_seqs=1024) == 1


def test_a_cache_larger_than_the_machine_is_refused() -> None:
    worker = Worker(CONFIG)
    worker.load()
    with pytest.raises(ConfigError, match="does not fit"):
        worker.allocate(10**12)


def test_groups_keep_the_order_of_their_first_layers() -> None:
    full = AttentionSpec(4, 2, 8, 16, torch.float32, torch.float32, 1.0)
    window = replace(full, sliding_window=32)
    groups = group_layers([window, full, window])
    assert [group.layer_indices for group in groups] == [(0, 2), (1,)]
    assert make_kv_spec(groups, 16).num_tensors == 2


@pytest.mark.parametrize(
    ("num_local", "num_full", "length", "size"),
    [(40, 8, 131072, 8), (21, 21, 8192, 21), (52, 10, 131072, 10), (40, 8, 64, 8), (0, 32, 4096, 32), (7, 1, 4096, 1)],
)
def test_groups_have_a_size_that_wastes_little(num_local: int, num_full: int, length: int, size: int) -> None:
    """A group of 8 layers beside one of 40 would leave four fifths of its blocks empty."""
    full = AttentionSpec(4, 2, 8, 16, torch.float32, torch.float32, 1.0)
    local = replace(full, sliding_window=1024)
    groups = group_layers([*[local] * num_local, *[full] * num_full], length)
    assert max(len(group.layer_indices) for group in groups) == size
    assert sorted(index for group in groups for index in group.layer_indices) == list(range(num_local + num_full))
    spec = make_kv_spec(groups, 16)
    without_windows = (num_local + num_full) * length // 16
    assert spec.num_tensors * spec.blocks_for_tokens(length) <= 1.2 * without_windows
    assert f"holds {spec.blocks_for_tokens(length) * spec.bytes_per_block / 2**20:.1f} MiB" in spec.describe(length)

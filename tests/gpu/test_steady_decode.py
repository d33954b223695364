"""A worker on the GPU, step by step: steady decode waits for nothing, results come through events, the memory ledger
fits the device, a step that runs out of memory fails its newest request only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.config.args import EngineArgs
from octavo.config.kv_cache_size import size_kv_cache
from octavo.config.resolve import resolve
from octavo.device.registry import probe_hardware
from octavo.messages import NewRow, ResolvedSampling, SchedulerOutput
from octavo.worker.worker import Worker

PROMPT = list(range(5, 45))


@pytest.fixture
def start(model_folders: dict[str, Path]) -> Callable[..., Worker]:
    def make(**settings: Any) -> Worker:
        args = EngineArgs(
            **{
                "model": str(model_folders["qwen3"]),
                "load_format": "dummy",
                "device": "cuda",
                "max_num_seqs": 32,
                "skip_tokenizer_init": True,
                "num_gpu_blocks_override": 300,
                **settings,
            }  # fmt: skip
        )
        located = locate_model(args.model, args.revision, args.download_dir)
        config, _ = resolve(args, located, read_model_config(located, {}), probe_hardware("cuda"))
        worker = Worker(config)
        report = worker.load()
        worker.allocate(size_kv_cache(args, config, report).num_blocks)
        worker.warm_up()
        return worker

    return make


def first_plan(count: int, temperature: float = 0.0) -> SchedulerOutput:
    new = [
        NewRow(
            row,
            PROMPT,
            len(PROMPT),
            0,
            ResolvedSampling(1000, row, temperature=temperature),
            [[1 + 2 * row, 2 + 2 * row]],
        )
        for row in range(count)
    ]
    return SchedulerOutput(0, [], new, list(range(count)), [len(PROMPT)] * count)


def decode_plan(step: int, count: int, **fields: Any) -> SchedulerOutput:
    return SchedulerOutput(step, [], [], list(range(count)), [1] * count, **fields)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_steady_decode_never_waits_for_the_device(
    count: int, eager: bool, temperature: float, start: Callable[..., Worker]
) -> None:
    worker = start(enforce_eager=eager)
    worker.forward(first_plan(count, temperature), None).result()
    for step in range(1, 5):  # the first ones may compile, gather parameters or record
        worker.forward(decode_plan(step, count), None).result()
    torch.cuda.synchronize()
    futures = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5, 25):
            futures.append(worker.forward(decode_plan(step, count), None))
            if len(futures) > 1:
                futures[-2].result()  # waits for an event, which is allowed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(tokens) == 1 for tokens in futures[-1].result().token_ids)


def test_a_step_is_queued_before_the_one_ahead_of_it_has_run(start: Callable[..., Worker]) -> None:
    worker = start()
    worker.forward(first_plan(4), None).result()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's time
    first = worker.forward(decode_plan(1, 4), None)
    second = worker.forward(decode_plan(2, 4), None)
    assert not first.done() and not second.done()
    assert len(second.result().token_ids) == 4
    assert first.done()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_recorded_steps_give_the_tokens_of_launched_ones(temperature: float, start: Callable[..., Worker]) -> None:
    def run(**settings: Any) -> list[list[list[int]]]:
        worker = start(dtype="float32", **settings)
        texts = [worker.forward(first_plan(5, temperature), None).result().token_ids]
        for step in range(1, 20):
            # Batches shrink and grow: rows move between places of the recorded batch.
            rows = [row for row in range(5) if (step + row) % 3]
            plan = SchedulerOutput(step, [], [], rows, [1] * len(rows))
            texts.append(worker.forward(plan, None).result().token_ids)
        return texts

    assert run() == run(enforce_eager=True)


def test_the_ledger_fits_the_device(start: Callable[..., Worker]) -> None:
    worker = start(num_gpu_blocks_override=None, gpu_memory_utilization=0.5)
    now = worker._device.memory()
    counted, used = sum(worker._ledger.values()), worker._at_start.free - now.free
    assert abs(counted - used) <= 0.02 * now.total, (worker._ledger, used)
    assert now.total - now.free <= 0.52 * now.total


def test_a_step_without_memory_fails_its_newest_request_only(start: Callable[..., Worker]) -> None:
    worker = start(enforce_eager=True)
    forward = worker._model.forward
    worker.forward(first_plan(3), None).result()

    def starve(batch: Any, hidden: Any = None) -> Any:
        if batch.shape.num_reqs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return forward(batch, hidden)

    worker._model.forward = starve
    output = worker.forward(decode_plan(1, 3), None).result()
    assert [len(tokens) for tokens in output.token_ids] == [1, 1, 0]
    assert list(output.errors) == [2] and "memory" in output.errors[2]
    worker._model.forward = forward
    again = worker.forward(replace_rows(decode_plan(2, 2)), None).result()
    assert [len(tokens) for tokens in again.token_ids] == [1, 1]


def replace_rows(plan: SchedulerOutput) -> SchedulerOutput:
    """The failed request has left."""
    return SchedulerOutput(plan.step_id, [2], [], plan.rows, plan.num_scheduled_tokens)

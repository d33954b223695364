"""A step for which the device has no memory: the newest requests of it fail, the others go on, later plans that still
name the failed ones do no harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.messages import SchedulerOutput
from octavo.worker import worker as worker_module
from octavo.worker.worker import Worker
from tests.unit.worker.test_cuda_graphs import RecordingCpu
from tests.unit.worker.test_worker import CONFIG, PROMPT, make_worker, new_row


class StarvingCpu(RecordingCpu):
    """Counts how often memory is given back."""

    num_freed = 0

    def free_unused(self) -> None:
        type(self).num_freed += 1


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(StarvingCpu, "num_freed", 0)
    monkeypatch.setattr(worker_module, "make_device", lambda device_type: StarvingCpu())
    return make_worker(CONFIG)


def starve(worker: Worker, at_most: int) -> None:
    """From now on no step of more requests has memory."""
    forward = type(worker._model).forward

    def starving(batch: Any, hidden: Any = None) -> Any:
        if batch.shape.num_reqs > at_most:
            raise torch.OutOfMemoryError("there is no more")
        return forward(worker._model, batch, hidden)

    worker._model.forward = starving  # type: ignore[method-assign]


def step(step_id: int, rows: list[int], **fields: Any) -> SchedulerOutput:
    return SchedulerOutput(step_id, [], [], rows, [1] * len(rows), **fields)


def start(worker: Worker, count: int) -> SchedulerOutput:
    return SchedulerOutput(0, [], [new_row(row) for row in range(count)], list(range(count)), [len(PROMPT)] * count)


def test_the_newest_request_fails_and_the_others_go_on(worker: Worker) -> None:
    expected = [worker.forward(start(worker, 3), None).result().token_ids]
    expected.append(worker.forward(step(1, [0, 1, 2]), None).result().token_ids)
    starved = make_worker(CONFIG)
    assert starved.forward(start(starved, 3), None).result().token_ids == expected[0]
    starve(starved, 2)
    later = starved.forward(step(1, [0, 1, 2]), None)
    in_flight = starved.forward(step(2, [0, 1, 2]), None)  # planned before anybody knows
    output = later.result()
    assert output.token_ids == [*expected[1][:2], []]
    assert list(output.errors) == [2] and "out of memory" in output.errors[2]
    assert [len(tokens) for tokens in in_flight.result().token_ids] == [1, 1, 0]
    assert StarvingCpu.num_freed > 0
    left = SchedulerOutput(3, [2], [], [0, 1], [1, 1])
    assert starved.forward(left, None).result().errors == {}


def test_memory_that_was_only_held_back_fails_nobody(worker: Worker) -> None:
    worker.forward(start(worker, 3), None).result()
    forward = type(worker._model).forward

    def starving(batch: Any, hidden: Any = None) -> Any:
        if StarvingCpu.num_freed == 0:
            raise torch.OutOfMemoryError("there is no more")
        return forward(worker._model, batch, hidden)

    worker._model.forward = starving  # type: ignore[method-assign]
    assert worker.forward(step(1, [0, 1, 2]), None).result().errors == {}


def test_a_prompt_that_never_fits_fails_and_the_engine_lives(worker: Worker) -> None:
    starve(worker, 0)
    output = worker.forward(start(worker, 2), None).result()
    assert output.token_ids == [[], []] and set(output.errors) == {0, 1}
    del worker._model.forward
    rows = SchedulerOutput(1, [0, 1], [new_row(0)], [0], [len(PROMPT)])
    assert worker.forward(rows, None).result().errors == {}

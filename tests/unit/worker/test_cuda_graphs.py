"""Recorded decode steps on a CPU that says it has graphs: a "graph" there is the recorded function itself, so all
but the recording is the real thing. Turns red when a batch is filled up with rows that exist, when a buffer that a
graph reads is not brought up to date, when a step that needs more is replayed, or when results wait for the device."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch
from torch import Tensor

from octavo.device.cpu import CpuDevice
from octavo.messages import SchedulerOutput
from octavo.worker.cuda_graphs import BUCKETS, make_buckets
from octavo.worker.outputs import PendingOutput, StepFuture
from octavo.worker.plain_sampling import DrawKind, kind_of
from tests.unit.worker.harness import MAX_LEN, ROWS, VOCAB, LittleEngine, next_token
from tests.unit.worker.test_model_runner import continued, params


class RecordingCpu(CpuDevice):
    """Behaves like a GPU as far as the worker can tell: downloads are copies, graphs are asked for."""

    is_asynchronous = True
    has_graphs = True

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


def make_engine(**settings: object) -> LittleEngine:
    engine = LittleEngine(device=RecordingCpu(), **settings)  # type: ignore[arg-type]
    with torch.inference_mode():
        engine.runner.record_graphs()
    return engine


@pytest.mark.parametrize("num_groups", [1, 2])
def test_random_workloads_continue_every_text(num_groups: int) -> None:
    # Mostly decode steps of changing sets of rows; sometimes chunks, new requests and requests that come back.
    rng = random.Random(num_groups)
    engine = make_engine(num_groups=num_groups)
    prompts: dict[int, list[int]] = {}
    for _ in range(200):
        if engine.texts and rng.random() < 0.1:
            row = rng.choice(list(engine.texts))
            engine.remove(row)
            prompts.pop(row)
        free = [row for row in range(ROWS) if row not in engine.texts]
        if free and rng.random() < 0.3:
            prompts[free[0]] = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
            engine.add(free[0], prompts[free[0]], params(), computed=rng.randrange(len(prompts[free[0]])))
        whole = rng.random() < 0.8
        work = {
            row: len(text) - engine.computed[row] if whole else rng.randint(1, len(text) - engine.computed[row])
            for row, text in engine.texts.items()
            if len(text) < MAX_LEN and rng.random() < 0.9
        }
        if not work:
            continue
        rows = list(work)
        rng.shuffle(rows)
        engine.step({row: work[row] for row in rows})
        for row in rows:
            assert engine.texts[row] == continued(prompts[row], len(engine.texts[row]))
    assert engine.prompt_graphs is not None and engine.prompt_graphs.num_replays > 20


def count_replays(engine: LittleEngine) -> list[tuple[DrawKind, int]]:
    """Kinds and sizes of the replays from now on."""
    assert engine.graphs is not None
    replays: list[tuple[DrawKind, int]] = []
    run = engine.graphs.run

    def counting(layout, kind):  # noqa: ANN001, ANN202
        result = run(layout, kind)
        if result is not None:
            replays.append((kind, len(layout.rows)))
        return result

    engine.graphs.run = counting  # type: ignore[method-assign]
    return replays


def test_steps_in_flight_do_not_disturb_one_another() -> None:
    engine = make_engine()
    for row in range(5):
        engine.add(row, [row + 1, row + 2], params())
    engine.step(dict.fromkeys(range(5), 2))
    replays = count_replays(engine)
    pending: deque[tuple[SchedulerOutput, PendingOutput]] = deque()
    for index in range(20):
        rows = [row for row in range(5) if (row + index) % 4]
        plan = engine.plan(dict.fromkeys(rows, 1))
        with torch.inference_mode():
            pending.append((plan, engine.begin(plan)))
        if len(pending) == 3:
            plan, output = pending.popleft()
            engine.apply(plan, output.result())
    for plan, output in pending:
        engine.apply(plan, output.result())
    assert len(replays) == 20
    for row in range(5):
        assert engine.texts[row] == continued([row + 1, row + 2], len(engine.texts[row]))


@pytest.mark.parametrize(
    ("wish", "kind"),
    [
        ({}, DrawKind.PLAIN),
        ({"temperature": 0.7}, DrawKind.PLAIN),
        ({"temperature": 0.7, "top_k": VOCAB}, DrawKind.PLAIN),
        ({"temperature": 0.0, "top_p": 0.5}, DrawKind.PLAIN),
        ({"temperature": 0.7, "top_k": 5}, DrawKind.FILTERED),
        ({"temperature": 0.7, "top_p": 0.5}, DrawKind.FILTERED),
        ({"temperature": 0.7, "min_p": 0.1}, DrawKind.FILTERED),
        ({"logprobs": 0}, DrawKind.OTHER),
        ({"logprob_token_ids": [3]}, DrawKind.OTHER),
        ({"repetition_penalty": 1.1}, DrawKind.OTHER),
        ({"presence_penalty": 0.1}, DrawKind.OTHER),
        ({"frequency_penalty": 0.1}, DrawKind.OTHER),
        ({"min_tokens": 3, "stop_token_ids": [next_token([3])]}, DrawKind.OTHER),
        ({"logit_bias": {7: 50.0}}, DrawKind.OTHER),
        ({"allowed_token_ids": [5, 6]}, DrawKind.OTHER),
        ({"bad_words_token_ids": [[9]]}, DrawKind.OTHER),
        (
            {"thinking_token_budget": 2, "think_start_token_id": 3, "think_end_token_id": 4},
            DrawKind.OTHER,
        ),
        ({"thinking_token_budget": -1}, DrawKind.PLAIN),
    ],
)
def test_every_wish_is_met_as_by_the_sampler(wish: dict[str, object], kind: DrawKind) -> None:
    assert kind_of(params(**wish), VOCAB) is kind
    texts = []
    for engine in (LittleEngine(), make_engine()):
        engine.add(2, [3], params(**wish))
        engine.add(0, [4, 5], params(temperature=0.9, seed=8))
        engine.step({2: 1, 0: 2})
        for _ in range(12):
            engine.step({0: 1, 2: 1})
        texts.append(engine.texts)
    assert texts[0] == texts[1]


def test_other_kinds_are_recorded_when_they_have_been_wanted_a_few_times() -> None:
    engine = make_engine()
    engine.add(0, [3], params(temperature=0.7, top_k=5))
    engine.step({0: 1})
    replays = count_replays(engine)
    for _ in range(5):
        engine.step({0: 1})
    assert replays == [(DrawKind.FILTERED, 1)] * len(replays) and 2 <= len(replays) < 5


def test_a_chunk_of_one_token_is_not_a_decode_step() -> None:
    engine = make_engine()
    engine.add(0, [3, 4, 5, 6], params())
    replays = count_replays(engine)
    outputs = [engine.step({0: 1}).token_ids for _ in range(3)]
    assert outputs == [[[]]] * 3 and not replays
    engine.step({0: 1})
    assert engine.texts[0] == continued([3, 4, 5, 6], 5) and len(replays) == 1


def test_nothing_is_plain_where_processors_may_change_it() -> None:
    engine = make_engine()
    assert engine.runner._plain is not None
    engine.runner._plain._has_processors = True
    engine.add(0, [3], params())
    engine.step({0: 1})
    replays = count_replays(engine)
    for _ in range(4):
        engine.step({0: 1})
    assert {kind for kind, _ in replays} == {DrawKind.OTHER}
    assert engine.texts[0] == continued([3], 6)


def test_sizes() -> None:
    assert make_buckets(1) == [1]
    assert make_buckets(5) == [1, 2, 4, 5]
    assert make_buckets(256) == [size for size in BUCKETS if size <= 256]
    assert make_buckets(10_000)[-1] == BUCKETS[-1]


def test_a_future_waits_for_its_own_step_only() -> None:
    asked: list[str] = []

    class Pending:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self.name, self.error, self.ready = name, error, False

        def is_ready(self) -> bool:
            return self.ready

        def result(self) -> str:
            asked.append(self.name)
            if self.error is not None:
                raise self.error
            return self.name

    first, second, third = StepFuture(), StepFuture(), StepFuture()
    pending = Pending("first")
    first.attach(pending)  # type: ignore[arg-type]
    second.attach(Pending("second"))  # type: ignore[arg-type]
    third.attach(Pending("third", RuntimeError("the device is gone")))  # type: ignore[arg-type]
    assert not first.done()
    pending.ready = True
    assert first.done() and asked == []
    assert second.result() == "second" and asked == ["second"]
    assert first.result() == first.result() == "first"
    assert isinstance(third.exception(), RuntimeError)
    with pytest.raises(RuntimeError, match="gone"):
        third.result()
    assert asked == ["second", "first", "third"]

"""The step over a model that recites its history. Turns red when rows, tables, slots, positions or tokens get mixed up
by chunks, new and removed rows, added blocks, deferral, or pieces of logits."""

from __future__ import annotations

import random

import pytest
import torch

from octavo.messages import Logprobs, ResolvedSampling
from octavo.worker import model_runner
from tests.unit.worker.harness import MAX_LEN, ROWS, VOCAB, LittleEngine, next_token


def params(**fields: object) -> ResolvedSampling:
    return ResolvedSampling(**{"max_tokens": 100, "seed": 5, "temperature": 0.0, **fields})  # type: ignore[arg-type]


def continued(prompt: list[int], length: int) -> list[int]:
    """The greedy text of HistoryModel up to a length."""
    text = list(prompt)
    while len(text) < length:
        text.append(next_token(text))
    return text


@pytest.mark.parametrize("num_groups", [1, 2])
def test_random_workloads_continue_every_text(num_groups: int) -> None:
    # Requests come, are chunked at random, preempted, come back on another row with a part computed, and end.
    rng = random.Random(num_groups)
    engine = LittleEngine(num_groups=num_groups)
    prompts: dict[int, list[int]] = {}
    drawn = 0
    for _ in range(250):
        free = [row for row in range(ROWS) if row not in engine.texts]
        if free and rng.random() < 0.5:
            prompts[free[0]] = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]
            engine.add(free[0], prompts[free[0]], params(), computed=rng.randrange(len(prompts[free[0]])))
        if engine.texts and rng.random() < 0.1:
            row = rng.choice(list(engine.texts))
            prompt, text = prompts.pop(row), engine.remove(row)
            if rng.random() < 0.6:
                back = rng.choice([r for r in range(ROWS) if r not in engine.texts])
                prompts[back] = prompt
                engine.add(back, text, params(), num_prompt=len(prompt), computed=rng.randrange(len(text)))
        work = {
            row: rng.randint(1, len(text) - engine.computed[row])
            for row, text in engine.texts.items()
            if len(text) < MAX_LEN and rng.random() < 0.8
        }
        if not work:
            continue
        rows = list(work)
        rng.shuffle(rows)
        output = engine.step({row: work[row] for row in rows})
        drawn += sum(map(len, output.token_ids))
        for row in rows:
            assert engine.texts[row] == continued(prompts[row], len(engine.texts[row]))
    assert drawn > 300


def test_a_step_can_be_launched_before_the_last_one_has_drawn_on_the_host() -> None:
    # The plan of step N + 1 is made and launched while the host has not seen token N.
    engine = LittleEngine()
    engine.add(0, [1, 2, 3], params())
    engine.add(1, [4], params())
    pending = []
    with torch.inference_mode():
        pending.append((plan := engine.plan({0: 3, 1: 1}), engine.begin(plan)))
        for _ in range(20):
            plan = engine.plan({0: 1, 1: 1})
            pending.append((plan, engine.begin(plan)))
    for plan, output in pending:
        engine.apply(plan, output.result())
    assert engine.texts[0] == continued([1, 2, 3], 24)
    assert engine.texts[1] == continued([4], 22)


def test_a_chunk_that_does_not_reach_the_last_token_draws_nothing() -> None:
    engine = LittleEngine()
    engine.add(0, [1, 2, 3, 4, 5], params())
    engine.add(1, [9], params())
    assert engine.step({0: 3, 1: 1}).token_ids == [[], [next_token([9])]]
    assert engine.step({1: 1, 0: 2}).token_ids[1] == [next_token([1, 2, 3, 4, 5])]


def test_the_drawing_rows_may_change_while_rows_and_counts_stay() -> None:
    # Both steps run one token of rows 0 and 1. In the first row 0 draws and row 1 is inside its prompt; then row 0 is
    # given to a new prompt while row 1 reaches its end.
    engine = LittleEngine()
    engine.add(0, [1, 2], params(), computed=1)
    engine.add(1, [3, 4], params())
    assert engine.step({0: 1, 1: 1}).token_ids == [[next_token([1, 2])], []]
    engine.remove(0)
    engine.add(0, [5, 6], params())
    assert engine.step({0: 1, 1: 1}).token_ids == [[], [next_token([3, 4])]]


@pytest.mark.parametrize("fields", [{"temperature": 1.5}, {"temperature": 1.5, "top_k": 20, "presence_penalty": 0.5}])
def test_a_seeded_text_is_the_same_alone_in_a_batch_chunked_and_preempted(fields: dict[str, object]) -> None:
    prompt = list(range(40))

    def text(crowd: int, chunk: int, preempted_at: int | None) -> list[int]:
        engine = LittleEngine()
        for row in range(crowd):
            engine.add(row, [row], params(temperature=1.0, seed=row, top_p=0.9))
        row = 7
        engine.add(row, prompt, params(**fields))
        while len(engine.texts[row]) < 70:
            if preempted_at is not None and len(engine.texts[row]) == preempted_at:
                kept, preempted_at = engine.remove(row), None
                row = 6
                engine.add(row, kept, params(**fields), num_prompt=len(prompt))
            rest = len(engine.texts[row]) - engine.computed[row]
            engine.step({**dict.fromkeys(range(crowd), 1), row: min(chunk, rest)})
        return engine.texts[row]

    alone = text(0, 100, None)
    assert text(5, 100, None) == alone
    assert text(3, 7, None) == alone
    assert text(0, 13, 55) == alone


def test_logits_are_made_in_bounded_pieces() -> None:
    whole, pieces = LittleEngine(), LittleEngine(max_logits_rows=3)
    for engine in (whole, pieces):
        for row in range(ROWS):
            engine.add(row, [row, 2 * row], params(temperature=0.0 if row % 2 else 1.0, logprobs=row))
        outputs = [engine.step(dict.fromkeys(range(ROWS), 2))]
        outputs += [engine.step(dict.fromkeys(range(ROWS), 1)) for _ in range(5)]
        engine.seen = [(o.token_ids, o.logprobs) for o in outputs]  # type: ignore[attr-defined]
    assert whole.seen == pieces.seen  # type: ignore[attr-defined]
    assert (whole.model.largest_logits, pieces.model.largest_logits) == (ROWS, 3)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("num_top", [0, 3, -1])
def test_prompt_logprobs_cover_the_prompt_once_whatever_the_pieces(
    chunk: int, num_top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_PIECE", 16)
    prompt = [(7 * i) % VOCAB for i in range(50)]
    engine = LittleEngine()
    engine.add(0, [5, 6], params())
    engine.add(1, prompt, params(prompt_logprobs=num_top))
    found = Logprobs([], [], [])
    while len(engine.texts[1]) < 53:
        rest = len(engine.texts[1]) - engine.computed[1]
        decode = len(engine.texts[0]) - engine.computed[0]
        output = engine.step({0: decode, 1: min(chunk, rest)})
        if output.prompt_logprobs and output.prompt_logprobs[1] is not None:
            assert output.prompt_logprobs[0] is None
            part = output.prompt_logprobs[1]
            found.token_ids += part.token_ids
            found.logprobs += part.logprobs
            found.ranks += part.ranks
    # A bound on memory: never more rows of logits at once than a piece.
    assert engine.model.largest_logits <= 16
    said = torch.tensor([[float(next_token(prompt[: i + 1]))] for i in range(49)])
    values = engine.model.compute_logits(said).log_softmax(1)
    assert [ids[0] for ids in found.token_ids] == prompt[1:]
    assert {len(ids) for ids in found.token_ids} == {1 + (VOCAB if num_top < 0 else num_top)}
    for i, (ids, shown) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
        torch.testing.assert_close(torch.tensor(shown), values[i, ids])
        assert found.ranks[i] == 1 + int((values[i] > values[i, prompt[i + 1]]).sum())


def test_output_logprobs_have_each_requests_own_width() -> None:
    engine = LittleEngine()
    engine.add(0, [1], params(logprobs=2))
    engine.add(1, [2], params())
    engine.add(2, [3], params(logprobs=0, logprob_token_ids=[8, 9]))
    output = engine.step({0: 1, 1: 1, 2: 1})
    first, none, last = output.logprobs
    assert first is not None and none is None and last is not None
    assert first.token_ids[0][:2] == [next_token([1])] * 2 and len(first.token_ids[0]) == 3
    assert last.token_ids[0] == [next_token([3]), 8, 9]
    assert len(last.logprobs[0]) == 3
    assert first.ranks == [1]


def test_nan_logits_fail_their_request_alone() -> None:
    engine = LittleEngine()
    engine.model.broken_token = 50
    engine.add(0, [1, 50], params(logprobs=1))
    engine.add(1, [1, 2], params())
    output = engine.step({0: 2, 1: 2})
    assert output.token_ids == [[], [next_token([1, 2])]]
    assert list(output.errors) == [0] and "NaN" in output.errors[0]
    assert output.logprobs == [None, None]


def test_a_processor_that_raises_fails_its_request_alone() -> None:
    engine = LittleEngine(processors=("tests.unit.sampling.processors:RaisesOnDemand",))
    for row, extra in enumerate([None, {"raise": "apply"}, {"raise": "never"}, {"raise": "add"}]):
        engine.add(row, [row + 1], params(extra_args=extra))
    output = engine.step(dict.fromkeys(range(4), 1))
    # The processor adds 100 to token 0 of the rows that it takes part in.
    assert output.token_ids == [[next_token([1])], [], [0], []]
    assert {row: "boom" in text for row, text in output.errors.items()} == {1: True, 3: True}
    assert engine.step({0: 1, 2: 1}).errors == {}


def test_a_grammar_mask_decides_the_drawing_rows() -> None:
    engine = LittleEngine()
    engine.add(0, [1, 2, 3], params())
    engine.add(1, [4], params())
    plan = engine.plan({0: 2, 1: 1})
    mask = torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
    mask[0, 1] = 1 << 9
    with torch.inference_mode():
        output = engine.begin(plan, mask.numpy().tobytes()).result()
    assert output.token_ids == [[], [41]]

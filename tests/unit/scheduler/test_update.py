"""What a result does: stops, limits, errors, late results, prompt logprobs, timings, counters."""

from __future__ import annotations

from itertools import pairwise

import pytest

from octavo.messages import FinishReason, ModelRunnerOutput
from octavo.sampling_params import RepetitionDetection
from octavo.scheduler.update import ends_in_repetition
from tests.unit.scheduler.driver import Driver


class Puppet(Driver):
    """The next tokens are chosen by the test."""

    def feed(self, *tokens: int) -> None:
        for token in tokens:
            plan = self.scheduler.schedule()
            assert plan is not None
            result = ModelRunnerOutput(plan.step_id, [[token] for _ in plan.rows])
            self.outputs += self.scheduler.update(plan, result)
            self.scheduler.check_books()

    def end(self) -> tuple[FinishReason | None, int | None]:
        return self.outputs[-1].finish_reason, self.outputs[-1].stop_reason


@pytest.mark.parametrize(
    ("fields", "tokens", "end"),
    [
        ({"eos_token_ids": [9]}, [1, 9], (FinishReason.STOP, None)),
        ({"stop_token_ids": [8, 9]}, [1, 9], (FinishReason.STOP, 9)),
        ({"eos_token_ids": [9], "stop_token_ids": [9]}, [9], (FinishReason.STOP, None)),
        ({"eos_token_ids": [9], "min_tokens": 3}, [9, 9, 9], (FinishReason.STOP, None)),
        ({"stop_token_ids": [9], "min_tokens": 2}, [9, 1, 9], (FinishReason.STOP, 9)),
        ({"eos_token_ids": [9]}, [1, 2, 3, 9], (FinishReason.STOP, None)),
        ({"min_tokens": 4}, [1, 2, 3, 4], (FinishReason.LENGTH, None)),
        ({"repetition_detection": RepetitionDetection(max_pattern_size=2)}, [1, 2, 2], (FinishReason.REPETITION, None)),
        (
            {"repetition_detection": RepetitionDetection(max_pattern_size=2, min_pattern_size=2)},
            [1, 2, 1, 2],
            (FinishReason.REPETITION, None),
        ),
        (
            {"repetition_detection": RepetitionDetection(max_pattern_size=2), "min_tokens": 3},
            [2, 2, 2],
            (FinishReason.REPETITION, None),
        ),
    ],
)
def test_ends(fields: dict[str, object], tokens: list[int], end: tuple[FinishReason, int | None]) -> None:
    driver = Puppet()
    driver.add("a", [9, 9, 9], max_tokens=4, **fields)
    driver.feed(*tokens)
    assert [output.finish_reason for output in driver.outputs[:-1]] == [None] * (len(tokens) - 1)
    assert driver.end() == end
    assert driver.tokens("a") == tokens
    assert not driver.scheduler.has_admissible_work()


def test_a_pattern_of_the_prompt_does_not_count_as_repetition() -> None:
    driver = Puppet()
    driver.add("a", [5, 5, 5], max_tokens=4, repetition_detection=RepetitionDetection(max_pattern_size=1))
    driver.feed(5)
    assert driver.end() == (None, None)
    driver.feed(5)
    assert driver.end() == (FinishReason.REPETITION, None)


def test_repetition_by_definition() -> None:
    """Against a spelled-out definition, over all short sequences of two tokens."""
    for rule in (
        RepetitionDetection(max_pattern_size=3),
        RepetitionDetection(max_pattern_size=2, min_count=3),
        RepetitionDetection(max_pattern_size=3, min_pattern_size=2, min_count=2),
    ):
        for bits in range(2**9):
            tokens = [bits >> index & 1 for index in range(9)]
            wanted = any(
                tokens[-size * rule.min_count :] == tokens[-size:] * rule.min_count
                for size in range(rule.min_pattern_size, rule.max_pattern_size + 1)
                if size * rule.min_count <= 9
            )
            assert ends_in_repetition([7, 7, *tokens], 2, rule) == wanted, (tokens, rule)


def test_a_finished_request_gives_back_everything_and_its_late_result_is_dropped() -> None:
    driver = Driver()
    driver.add("probe", 3, max_tokens=2)
    driver.finish()
    first_token = driver.tokens("probe")[0]
    stopping = Driver()
    stopping.add("probe", 3, max_tokens=10, stop_token_ids=[first_token])
    stopping.plan()
    stopping.plan()  # planned before the stop is seen
    assert stopping.apply()[0].stop_reason == first_token
    assert stopping.apply() == []
    snapshot = stopping.scheduler.snapshot()
    assert (snapshot.num_running, snapshot.num_free_blocks, snapshot.generation_tokens) == (0, 99, 1)
    stopping.add("probe", 3, max_tokens=1)  # the id is free again


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abort_of_a_waiting_a_running_and_an_in_flight_request(num_steps: int) -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("a", 3, max_tokens=9)
    driver.add("b", 3, max_tokens=1)
    for _ in range(num_steps):
        driver.plan()
    (output,) = driver.scheduler.abort(["a", "nobody", "a"])
    assert (output.request_id, output.finish_reason, output.new_token_ids) == ("a", FinishReason.ABORT, [])
    assert output.timings is not None and output.timings.queued_s == 100.0
    driver.finish()
    assert {output.request_id for output in driver.outputs} == {"b"}
    assert driver.scheduler.snapshot().finished == {"abort": 1, "length": 1}


def test_an_error_ends_one_request_alone_and_its_blocks_are_not_reused() -> None:
    driver = Driver()
    driver.add("good", 3, max_tokens=3)
    driver.add("bad", list(range(10)), max_tokens=3)
    driver.step()  # its prompt is in the prefix cache now
    plan = driver.scheduler.schedule()
    assert plan is not None
    result = driver.worker.forward(plan, None).result()
    result.errors[1], result.token_ids[1] = "NaN", []
    good, bad = driver.scheduler.update(plan, result)
    assert (bad.request_id, bad.finish_reason, bad.error) == ("bad", FinishReason.ERROR, "NaN")
    assert good.finish_reason is None
    driver.finish()
    assert driver.scheduler.snapshot().finished == {"error": 1, "length": 1}
    driver.add("again", list(range(10)), max_tokens=1)
    plan = driver.plan()
    assert plan is not None and plan.num_scheduled_tokens == [10]


def test_prompt_logprobs_come_in_order_exactly_once_even_when_the_prompt_is_computed_twice() -> None:
    driver = Driver(num_blocks=1 + 8, max_num_batched_tokens=6, prefix_caching=False)
    driver.add("first", 4, max_tokens=20)
    driver.add("asks", 20, max_tokens=2, prompt_logprobs=0)
    driver.finish()
    assert driver.scheduler.snapshot().num_preemptions > 0, "the case that this test is for"
    chunks = [output.prompt_logprobs for output in driver.outputs if output.prompt_logprobs is not None]
    prompt = 1000 * (1 + sum(b"asks"))
    assert [ids[0] for chunk in chunks for ids in chunk.token_ids] == list(range(prompt + 1, prompt + 20))
    assert all(len(chunk.token_ids) == len(chunk.ranks) == len(chunk.logprobs) for chunk in chunks)


def test_timings_and_counters() -> None:
    driver = Driver()
    driver.add("a", 6, max_tokens=3, tenant="x")
    for now_s in (101.0, 102.0, 103.0):
        driver.now_s = now_s
        driver.step()
    timings = driver.outputs[-1].timings
    assert timings is not None
    stamps = [timings.queued_s, timings.scheduled_s, timings.first_token_s, timings.last_token_s]
    assert stamps == [100.0, 101.0, 101.0, 103.0]
    assert all(before <= after for before, after in pairwise(stamps))
    assert [output.timings for output in driver.outputs[:-1]] == [None, None], "with the last output only"
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.time_s, snapshot.num_steps, snapshot.forward_ms) == (103.0, 3, 3.0)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens, snapshot.tenant_tokens) == (6, 3, {"x": 9})


def test_a_snapshot_does_not_change_afterwards() -> None:
    driver = Driver()
    driver.add("a", 6, max_tokens=1)
    before = driver.scheduler.snapshot()
    driver.finish()
    assert (before.finished, before.num_waiting, before.tenant_tokens) == ({}, 1, {})


def test_results_out_of_order_are_a_programming_error() -> None:
    driver = Driver()
    driver.add("a", 3)
    driver.plan()
    driver.plan()
    driver.in_flight.reverse()
    with pytest.raises(AssertionError, match="order of the plans"):
        driver.apply()

"""A request that an engine before this one had begun: it goes on as after a preemption, and nothing comes twice."""

from __future__ import annotations

import pytest

from octavo.errors import QueueFullError
from octavo.messages import FinishReason, Resumption
from tests.unit.scheduler.driver import Driver

PROMPT = [7, 8, 9, 10, 11]


def whole(max_tokens: int = 12, **fields: object) -> list[int]:
    driver = Driver()
    driver.add("a", PROMPT, max_tokens, **fields)
    driver.finish()
    return driver.tokens("a")


@pytest.mark.parametrize("num_delivered", [0, 1, 4, 11])
def test_it_ends_where_an_undisturbed_one_ends(num_delivered: int) -> None:
    tokens = whole()
    driver = Driver()
    driver.add("a", PROMPT, 12, resumption=Resumption(tokens[:num_delivered]))
    outputs = driver.finish()
    assert driver.tokens("a") == tokens[num_delivered:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_delivered_tokens_are_output_for_the_sampler_and_for_min_tokens() -> None:
    tokens = whole()
    stop = tokens[5]
    driver = Driver()
    driver.add("a", PROMPT, 12, resumption=Resumption(tokens[:3]), min_tokens=8, stop_token_ids=[stop])
    plan = driver.plan()
    assert plan is not None
    # Seeds, penalties and min_tokens in the workers count from the end of the prompt.
    assert plan.new_rows[0].num_prompt_tokens == len(PROMPT)
    assert plan.new_rows[0].token_ids == PROMPT + tokens[:3]
    driver.finish()
    expected = whole(min_tokens=8, stop_token_ids=[stop])
    assert driver.tokens("a") == expected[3:]


def test_prompt_logprobs_go_on_where_they_were() -> None:
    undisturbed = Driver()
    undisturbed.add("a", PROMPT, 2, prompt_logprobs=0)
    outputs = undisturbed.finish()
    everything = [row for each in outputs if each.prompt_logprobs for row in each.prompt_logprobs.token_ids]
    driver = Driver()
    driver.add("a", PROMPT, 2, prompt_logprobs=0, resumption=Resumption([], num_prompt_logprobs=3))
    rest = [row for each in driver.finish() if each.prompt_logprobs for row in each.prompt_logprobs.token_ids]
    assert len(everything) == len(PROMPT) - 1
    assert rest == everything[3:]


def test_a_full_queue_takes_back_what_it_had_let_in() -> None:
    driver = Driver(max_num_queued_reqs=1)
    driver.add("a", PROMPT)
    with pytest.raises(QueueFullError):
        driver.add("b", PROMPT)
    driver.add("c", PROMPT, resumption=Resumption([]))
    driver.finish()
    assert len(driver.tokens("c")) == 5


def test_abort_of_those_that_wait_only() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("runs", PROMPT, 8)
    driver.add("waits", PROMPT, 8)
    driver.step()
    assert driver.scheduler.abort(["runs", "waits"], only_if_waiting=True) == []
    assert driver.scheduler.abort(["runs"], only_if_waiting=True) == []
    (last,) = driver.scheduler.abort(["waits", "nobody"], only_if_waiting=True)
    assert (last.request_id, last.finish_reason) == ("waits", FinishReason.ABORT)
    driver.finish()
    assert len(driver.tokens("runs")) == 8

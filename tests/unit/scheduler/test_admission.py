"""What ``add`` refuses, with which error and what the message tells."""

from __future__ import annotations

import pytest

from octavo.errors import ConfigError, ContextLengthError, InvalidRequestError, QueueFullError
from octavo.scheduler.scheduler import Scheduler
from tests.simulation.configs import cache_config, kv_spec, scheduler_config
from tests.unit.scheduler.driver import Driver


def test_an_id_in_use_is_refused_until_its_request_ends() -> None:
    driver = Driver()
    driver.add("a", 3)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        driver.add("a", 3)
    driver.finish()
    driver.add("a", 3)


@pytest.mark.parametrize("prompt", [[], [1, -1], [2**32], [1.5], ["x"]])
def test_prompts_that_are_no_tokens_are_refused(prompt: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        Driver().add("a", prompt)


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 0}, {"priority": 1}, {"lora_name": "adapter"}], ids=lambda fields: next(iter(fields))
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Driver().add("a", 3, **fields)  # type: ignore[arg-type]
    assert caught.value.param in fields


def test_the_context_must_hold_the_prompt_and_one_token() -> None:
    driver = Driver(max_model_len=10)
    driver.add("fits", 9, max_tokens=1)
    with pytest.raises(ContextLengthError, match="10 tokens.*context of 10"):
        driver.add("too long", 10, max_tokens=1)
    driver.finish()
    assert len(driver.tokens("fits")) == 1


def test_what_can_never_fit_the_cache_is_refused_with_numbers() -> None:
    driver = Driver(num_blocks=1 + 3)
    driver.add("fits", 8, max_tokens=5)  # 12 slots: the last token is never run
    with pytest.raises(ContextLengthError, match="9 prompt tokens and up to 5 new ones need 4 .* the cache has 3"):
        driver.add("a", 9, max_tokens=5)
    driver.finish()
    assert len(driver.tokens("fits")) == 5


def test_a_window_needs_the_whole_prompt_at_once_only_without_chunks() -> None:
    driver = Driver(num_blocks=1 + 3, windows=(5,))
    driver.add("a", 60, max_tokens=5)
    driver.finish()
    whole = Driver(
        num_blocks=1 + 3, windows=(5,), enable_chunked_prefill=False, max_model_len=100, max_num_batched_tokens=100
    )
    with pytest.raises(ContextLengthError):
        whole.add("a", 60, max_tokens=5)


def test_the_queue_is_bounded_by_requests() -> None:
    driver = Driver(max_num_queued_reqs=2)
    driver.add("a", 3)
    driver.add("b", 3)
    with pytest.raises(QueueFullError, match="max_num_queued_reqs") as caught:
        driver.add("c", 3)
    assert caught.value.retry_after_s > 0
    driver.step()  # a and b run now
    driver.add("c", 3)


def test_the_queue_is_bounded_by_tokens_but_takes_one_prompt_of_any_length() -> None:
    driver = Driver(max_num_queued_tokens=10)
    driver.add("a", 20)
    with pytest.raises(QueueFullError, match="max_num_queued_tokens"):
        driver.add("b", 3)
    driver.scheduler.abort(["a"])
    driver.add("b", 3)
    driver.add("c", 7)
    with pytest.raises(QueueFullError):
        driver.add("d", 1)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_speculative_tokens": 2}, "num_speculative_tokens"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 511}, "max_num_batched_tokens"),
        (
            {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": 512,
                "long_prefill_token_threshold": 4,
            },
            "long_prefill_token_threshold",
        ),
        ({"policy": "nobody"}, "scheduling_policy"),
        ({"policy": "octavo.scheduler.policy:Nobody"}, "scheduling_policy"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheduler(scheduler_config(**changes), cache_config(4), kv_spec(4), 10)
    assert caught.value.param == param

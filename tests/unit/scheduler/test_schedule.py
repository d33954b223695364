"""Single steps of planning: order, budgets, chunks, preemption, depth. Everything at once: tests/simulation."""

from __future__ import annotations

import pytest

from tests.unit.scheduler.driver import Driver


def test_a_prompt_is_cut_at_the_budget_and_decoding_goes_on_beside_it() -> None:
    driver = Driver(max_num_batched_tokens=10)
    driver.add("short", 3)
    driver.step()
    driver.add("long", 25)
    counts = [driver.step()[0].num_scheduled_tokens for _ in range(4)]  # type: ignore[union-attr]
    assert counts == [[1, 9], [1, 9], [1, 7], [1, 1]]


def test_a_long_prompt_leaves_a_token_to_each_row_behind_it() -> None:
    """Red when a prompt that is readmitted before others holds up those who decode."""
    driver = Driver(max_num_batched_tokens=8, policy="priority")
    driver.add("decoding", 2, max_tokens=20, priority=5)
    driver.step()
    driver.add("urgent", 30, priority=0)
    driver.step()
    plan = driver.step()[0]
    assert plan is not None and plan.num_scheduled_tokens == [7, 1]


def test_threshold_limits_one_prompt_and_leaves_the_rest_to_others() -> None:
    driver = Driver(max_num_batched_tokens=32, long_prefill_token_threshold=6)
    driver.add("a", 20)
    driver.add("b", 20)
    plan = driver.plan()
    assert plan is not None and plan.num_scheduled_tokens == [6, 6]


def test_without_chunks_a_prompt_runs_whole_or_not_at_all() -> None:
    driver = Driver(max_num_batched_tokens=40, max_model_len=40, enable_chunked_prefill=False)
    driver.add("a", 30)
    driver.add("b", 30)
    counts = [driver.step()[0].num_scheduled_tokens for _ in range(2)]  # type: ignore[union-attr]
    assert counts == [[30], [1, 30]]


def test_rows_are_limited_and_reused() -> None:
    driver = Driver(max_num_seqs=2)
    for name in "abc":
        driver.add(name, 3, max_tokens=1)
    first = driver.step()[0]
    second = driver.step()[0]
    assert first is not None and second is not None
    assert sorted(row.row for row in first.new_rows) == [0, 1]
    assert second.removed_rows and second.new_rows[0].row in first.rows


def test_a_prefix_hit_skips_what_is_computed() -> None:
    driver = Driver()
    driver.add("a", list(range(10)), max_tokens=1)
    driver.finish()
    driver.add("b", [*range(9), 77, 78], max_tokens=1)
    plan = driver.plan()
    assert plan is not None
    assert (plan.new_rows[0].num_computed_tokens, plan.num_scheduled_tokens) == (8, [3])
    assert driver.apply()[0].num_cached_tokens == 8
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.prefix_queries, snapshot.prefix_hits, snapshot.cached_prompt_tokens) == (21, 8, 8)


@pytest.mark.parametrize("fields", [{"skip_reading_prefix_cache": True}, {"prompt_logprobs": 0}])
def test_requests_that_may_not_read_the_cache_still_fill_it(fields: dict[str, object]) -> None:
    driver = Driver()
    driver.add("writer", list(range(10)), max_tokens=1, **fields)
    driver.finish()
    driver.add("not a reader", list(range(10)), max_tokens=1, **fields)
    plan = driver.plan()
    assert plan is not None and plan.num_scheduled_tokens == [10]
    driver.apply()
    driver.add("reader", list(range(10)), max_tokens=1)
    plan = driver.plan()
    assert plan is not None and plan.num_scheduled_tokens == [2]


def test_the_newest_is_preempted_keeps_its_tokens_and_is_first_in_the_queue() -> None:
    driver = Driver(num_blocks=1 + 6, max_num_seqs=4, prefix_caching=False)
    driver.add("old", 7, max_tokens=14)
    driver.add("new", 7, max_tokens=14)
    while driver.scheduler.snapshot().num_preemptions == 0:
        driver.step()
    driver.add("late", 3, max_tokens=1)
    kept = driver.tokens("new")
    assert kept and driver.scheduler.snapshot().num_running == 1
    while True:
        plan, _ = driver.step()
        if plan is not None and plan.new_rows:
            break
    assert plan.new_rows[0].token_ids[7:] == kept
    assert plan.new_rows[0].num_prompt_tokens == 7
    driver.finish()
    assert len(driver.tokens("old")) == len(driver.tokens("new")) == 14
    preemptions = {output.request_id: output.timings.num_preemptions for output in driver.outputs if output.timings}
    assert preemptions == {"old": 0, "new": 1, "late": 0}


def test_a_preempted_request_with_a_token_in_flight_is_not_admitted_before_it_is_back() -> None:
    driver = Driver(num_blocks=1 + 5, prefix_caching=False)
    driver.add("old", 7, max_tokens=10)
    driver.add("new", 7, max_tokens=10)
    while driver.scheduler.snapshot().num_preemptions == 0:
        driver.plan()
    in_flight = len(driver.in_flight)
    assert in_flight >= 2
    driver.scheduler.abort(["old"])  # room enough, but the token is still to come
    assert driver.plan() is None
    for _ in range(in_flight):
        driver.apply()
    plan = driver.plan()
    assert plan is not None
    assert plan.new_rows[0].token_ids[7:] == driver.tokens("new") != []
    driver.finish()
    assert len(driver.tokens("new")) == 10


def test_nothing_is_planned_beyond_max_tokens_however_deep() -> None:
    driver = Driver()
    driver.add("a", 3, max_tokens=3)
    plans = [driver.plan() for _ in range(5)]
    assert [plan is not None for plan in plans] == [True, True, True, False, False]
    assert driver.finish()[-1].new_token_ids
    assert len(driver.tokens("a")) == 3


def test_nothing_is_planned_beyond_the_context() -> None:
    driver = Driver(max_model_len=6)
    driver.add("a", 4, max_tokens=100)
    assert [driver.plan() is not None for _ in range(4)] == [True, True, False, False]
    driver.finish()
    assert len(driver.tokens("a")) == 2


def test_a_window_runs_in_a_cache_smaller_than_the_sequence() -> None:
    """Red when out-of-window blocks are kept, or a chunk is not cut to the room there is."""
    driver = Driver(num_blocks=1 + 3, windows=(5,), max_num_batched_tokens=64)
    driver.add("a", 60, max_tokens=20)
    driver.finish()
    assert len(driver.tokens("a")) == 20


def test_an_idle_scheduler_plans_nothing() -> None:
    driver = Driver()
    assert driver.scheduler.schedule() is None
    assert not driver.scheduler.has_admissible_work()
    driver.add("a", 3)
    assert driver.scheduler.has_admissible_work()


def test_the_plan_does_not_share_the_token_list_that_goes_on_growing() -> None:
    driver = Driver()
    prompt = [1, 2, 3]
    driver.add("a", prompt)
    plan = driver.plan()
    assert plan is not None
    driver.apply()
    assert plan.new_rows[0].token_ids == prompt == [1, 2, 3]


def test_nobody_is_preempted_for_a_request_behind_it() -> None:
    """Red when one that waits for its last token loses its blocks to a later request."""
    driver = Driver(num_blocks=1 + 4, prefix_caching=False)
    driver.add("first", 7, max_tokens=1)
    driver.add("second", 7, max_tokens=5)
    driver.plan()  # the last token of first is in flight
    driver.plan()  # second decodes
    assert driver.plan() is None, "second needs a block and has to wait for first to end"
    driver.finish()
    assert driver.scheduler.snapshot().num_preemptions == 0
    assert len(driver.tokens("second")) == 5


def test_requests_are_found_by_the_names_that_clients_know() -> None:
    driver = Driver()
    for name in ("a", "a#0", "a#1000001", "a/1#2", "ab", "b#0/x"):
        driver.add(name, 4)
    driver.add("c", 4, tenant="other")
    driver.step()  # running or waiting makes no difference
    find = driver.scheduler.find
    assert find(["a", "b", "c", "a/1"], None) == {
        "a": ["a", "a#0", "a#1000001", "a/1#2"], "a/1": ["a/1#2"], "c": ["c"],
    }  # fmt: skip
    assert find(["a", "c"], "other") == {"c": ["c"]}
    driver.finish()
    assert find(["a", "c"], None) == {}

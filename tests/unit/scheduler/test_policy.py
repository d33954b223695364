"""Order, victims and counters of the three policies, on requests that nobody runs."""

from __future__ import annotations

import itertools

import pytest

from octavo.kv_cache.manager import SequenceBlocks
from octavo.messages import RequestTimings, ResolvedSampling
from octavo.scheduler.policy import FairPolicy, SchedulingPolicy, make_policy
from octavo.scheduler.request import Request
from tests.simulation.configs import scheduler_config

_ARRIVALS = itertools.count()


def make_request(name: str, *, tenant: str = "t", priority: int = 0) -> Request:
    return Request(
        request_id=name,
        sampling=ResolvedSampling(max_tokens=1, seed=0),
        token_ids=[1],
        num_prompt_tokens=1,
        max_total_tokens=2,
        min_total_tokens=1,
        stop_ids=frozenset(),
        is_repetition_watched=False,
        tenant=tenant,
        priority=priority,
        arrival_index=next(_ARRIVALS),
        blocks=SequenceBlocks([1], b"", [[]]),
        timings=RequestTimings(queued_s=0.0),
        arrival_time_s=0.0,
    )


def drain(policy: SchedulingPolicy, charge: int = 0) -> str:
    names = ""
    while (request := policy.peek()) is not None:
        policy.remove(request)
        policy.on_tokens(request.tenant, charge, 0)
        names += request.request_id
    return names


def preempted(policy: SchedulingPolicy, *requests: Request) -> None:
    for request in requests:
        request.num_preemptions += 1
        policy.add(request)


@pytest.mark.parametrize("name", ["fcfs", "priority", "fair"])
def test_preempted_requests_go_before_new_ones_and_in_their_old_order(name: str) -> None:
    policy = make_policy(scheduler_config(policy=name))
    a, b, c = (make_request(letter) for letter in "abc")
    for request in (a, b):
        policy.add(request)
        policy.remove(request)
    policy.add(c)
    preempted(policy, b, a)  # the newest is taken first
    assert drain(policy) == "abc"


@pytest.mark.parametrize("name", ["fcfs", "priority", "fair"])
def test_an_aborted_request_leaves_the_queue_from_anywhere(name: str) -> None:
    policy = make_policy(scheduler_config(policy=name))
    requests = [make_request(letter) for letter in "abcd"]
    for request in requests:
        policy.add(request)
    preempted_one = make_request("p")
    preempted(policy, preempted_one)
    policy.remove(requests[1])
    policy.remove(preempted_one)
    assert drain(policy) == "acd"


def test_priority_runs_lower_numbers_first_and_gives_up_higher_ones() -> None:
    policy = make_policy(scheduler_config(policy="priority"))
    requests = [make_request(name, priority=priority) for name, priority in zip("abcd", (5, 0, 5, -1), strict=True)]
    for request in requests:
        policy.add(request)
    running = sorted(requests, key=policy.rank)
    assert policy.victim(running) is requests[2], "least important, of these the newest"
    assert drain(policy) == "dbac"


def test_fair_takes_tenants_in_turn_by_tokens_served() -> None:
    policy = make_policy(scheduler_config(policy="fair"))
    for name in "abcdef":
        policy.add(make_request(name, tenant="flood"))
    policy.add(make_request("X", tenant="quiet"))
    policy.add(make_request("Y", tenant="quiet"))
    assert drain(policy, charge=10) == "aXbYcdef"


def test_fair_weights_are_shares() -> None:
    policy = make_policy(scheduler_config(policy="fair", tenant_weights={"big": 3.0}))
    for index in range(12):
        policy.add(make_request(f"b{index:02}", tenant="big"))
        policy.add(make_request(f"s{index:02}", tenant="small"))
    names = drain(policy, charge=10)
    served = [names[index] for index in range(0, len(names), 3)][:16]
    assert (served.count("b"), served.count("s")) == (12, 4)


def test_a_tenant_that_was_away_is_lifted_to_those_who_waited() -> None:
    """Red when a pause earns credit: N would be served 100 times in a row here."""
    policy = make_policy(scheduler_config(policy="fair"))
    policy.on_tokens("busy", 0, 1000)
    policy.add(make_request("a", tenant="busy"))
    policy.add(make_request("b", tenant="busy"))
    for name in "NM":
        policy.add(make_request(name, tenant="new"))
    assert drain(policy, charge=10) == "aNbM"


def test_a_newcomer_to_an_empty_queue_starts_at_the_level_of_who_left_last() -> None:
    policy = make_policy(scheduler_config(policy="fair"))
    busy = make_request("a", tenant="busy")
    policy.on_tokens("busy", 0, 1000)
    policy.add(busy)
    policy.remove(busy)
    policy.add(make_request("N", tenant="new"))
    policy.add(make_request("M", tenant="new"))
    policy.add(make_request("b", tenant="busy"))
    assert drain(policy, charge=10) == "NbM"


def test_a_pause_does_not_wipe_out_what_a_tenant_has_had() -> None:
    policy = make_policy(scheduler_config(policy="fair"))
    policy.on_tokens("greedy", 0, 1000)
    for name in "ab":
        policy.add(make_request(name, tenant="modest"))
    policy.add(make_request("G", tenant="greedy"))
    assert drain(policy, charge=10) == "abG"


def test_fair_gives_up_the_newest_of_the_tenant_served_most() -> None:
    policy = make_policy(scheduler_config(policy="fair"))
    running = [make_request(name, tenant=tenant) for name, tenant in zip("abcd", "xyyx", strict=True)]
    policy.on_tokens("y", 0, 10)
    assert policy.victim(running).request_id == "c"
    policy.on_tokens("x", 0, 20)
    assert policy.victim(running).request_id == "d"


def test_counters_of_tenants_long_gone_are_forgotten() -> None:
    """Red when a client that makes up tenants can fill the memory."""
    policy = FairPolicy(scheduler_config(policy="fair"))
    for index in range(10_000):
        request = make_request("a", tenant=f"tenant{index}")
        policy.add(request)
        policy.remove(request)
        policy.on_tokens(request.tenant, 1, 0)
    assert len(policy._counters) < 5000  # noqa: SLF001

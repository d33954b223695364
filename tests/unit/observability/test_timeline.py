"""What is remembered of finished requests, and the page made of it."""

from __future__ import annotations

import time

from octavo.messages import RequestTimeline, RequestTimings
from octavo.observability.history import RequestHistory, belongs_to, names_of
from octavo.observability.timeline import describe_timeline


def sequence(request_id: str, timings: RequestTimings | None = None, status: str = "finished") -> RequestTimeline:
    now = time.monotonic()
    return RequestTimeline(
        request_id, status, "default", time.time(), timings or RequestTimings(queued_s=now, finished_s=now), 5, 0, 3,
        "stop" if status == "finished" else None,
    )  # fmt: skip


def test_only_the_last_ones_are_remembered() -> None:
    history = RequestHistory(capacity=3)
    for index in range(5):
        history.add(sequence(f"r{index}"))
    history.add(sequence("r3"))  # an id that is used again
    assert len(history) == 3
    assert [bool(history.find(f"r{index}")) for index in range(5)] == [False, False, True, True, True]


def test_parts_of_a_request() -> None:
    history = RequestHistory()
    for each in ("a", "a#0", "a#1", "a/0", "a/1#2", "ab", "a-1", "a/x", "b"):
        history.add(sequence(each))
    assert [each.request_id for each in history.find("a")] == ["a", "a#0", "a#1", "a/0", "a/1#2"]
    assert list(names_of("a/1/0#1")) == ["a/1/0#1", "a/1/0", "a/1", "a"]
    assert list(names_of("a/x#")) == ["a/x#"]
    assert not belongs_to("a-1", "a"), "a client's own request a-1 is not a part of a"


def test_events_in_their_order_with_times_of_day() -> None:
    start = time.monotonic() - 10
    timings = RequestTimings(
        queued_s=start + 0.1, scheduled_s=start + 0.2, first_token_s=start + 0.5, last_token_s=start + 3,
        num_preemptions=2, preempted_s=[start + 0.6, start + 1.5], resumed_s=[start + 1, start + 2],
        finished_s=start + 3,
    )  # fmt: skip
    done = sequence("r", timings)
    done.arrival_time_s = time.time() - 10
    page = describe_timeline("r", [done])
    (one,) = page["sequences"]
    assert [event["event"] for event in one["events"]] == [
        "arrived", "queued", "scheduled", "first_token", "preempted", "resumed", "preempted", "resumed", "last_token",
        "finished",
    ]  # fmt: skip
    assert one["preemptions"] == 2 and one["finish_reason"] == "stop"
    arrived, *_, finished = one["events"]
    assert arrived["after_ms"] == 0 and abs(finished["after_ms"] - 3000) < 50
    assert abs(finished["time"] - (time.time() - 7)) < 0.5


def test_a_waiting_request_shows_what_has_happened_so_far() -> None:
    page = describe_timeline("r", [sequence("r", RequestTimings(queued_s=time.monotonic()), "waiting")])
    (one,) = page["sequences"]
    assert [event["event"] for event in one["events"]] == ["arrived", "queued"]
    assert one["status"] == "waiting" and one["finish_reason"] is None

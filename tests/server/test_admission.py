"""Room for requests: taken early, corrected once, given back always."""

from __future__ import annotations

import asyncio

import pytest

from octavo.errors import OctavoError, QueueFullError
from octavo.server.admission import Admission, AdmissionLimits


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(max_sequences: int = 4, max_queued_tokens: int = 100, clock: Clock | None = None) -> Admission:
    return Admission(AdmissionLimits(max_sequences, max_queued_tokens), clock=clock or Clock())


def books(admission: Admission) -> tuple[int, int, int]:
    return admission.num_requests, admission.num_sequences, admission.num_queued_tokens


def test_a_request_holds_room_before_it_is_parsed_and_gives_it_back_once() -> None:
    admission = make()
    with admission.enter(400) as ticket:
        assert books(admission) == (1, 1, 101)
        assert admission.reserve(num_sequences=3, num_prompt_tokens=20) is ticket
        assert books(admission) == (1, 3, 20)
        ticket.started()
        ticket.started()
        assert books(admission) == (1, 3, 0)
        ticket.close()
        ticket.started()
    assert books(admission) == (0, 0, 0)


def test_the_last_place_is_given_once() -> None:
    # vLLM #58192: counted after rendering, a burst is refused only when all its work is done.
    admission = make(max_sequences=2)
    with admission.enter(0), admission.enter(0):
        with pytest.raises(QueueFullError, match="max_num_queued_reqs"):
            admission.enter(0)
        assert admission.num_requests == 2 and admission.num_refused == 1
    admission.enter(0).close()


def test_what_turns_out_too_large_is_refused_and_leaves_nothing() -> None:
    admission = make()
    with admission.enter(0):
        with pytest.raises(QueueFullError), admission.enter(0):
            admission.reserve(num_sequences=4, num_prompt_tokens=1)
        assert books(admission) == (1, 1, 1)


def test_tokens_wait_until_the_request_has_begun() -> None:
    admission = make(max_queued_tokens=100)
    first = admission.enter(4 * 90)
    with pytest.raises(QueueFullError, match="prompt tokens wait"):
        admission.enter(4 * 20)
    first.started()
    admission.enter(4 * 20).close()
    first.close()
    # Alone, even a prompt above the limit is let in: waiting would never help it.
    admission.enter(4 * 1000).close()
    assert books(admission) == (0, 0, 0)


def test_each_task_corrects_its_own_ticket() -> None:
    admission = make(max_sequences=100)

    async def request(num_sequences: int) -> None:
        with admission.enter(0) as ticket:
            await asyncio.sleep(0)
            assert await asyncio.create_task(reserve(num_sequences)) is ticket

    async def reserve(num_sequences: int) -> object:
        await asyncio.sleep(0)
        return admission.reserve(num_sequences=num_sequences, num_prompt_tokens=1)

    async def main() -> None:
        await asyncio.gather(*(request(count) for count in range(1, 8)))

    asyncio.run(main())
    assert books(admission) == (0, 0, 0)


def test_retry_after_follows_the_pace() -> None:
    clock = Clock()
    admission = make(max_sequences=10, clock=clock)
    assert admission.retry_after_s(1) == 1.0
    tickets = [admission.enter(0) for _ in range(10)]
    for ticket in tickets[:5]:
        clock.now_s += 2.0
        ticket.close()  # one in two seconds
    for _ in range(5):
        admission.enter(0)
    with pytest.raises(QueueFullError) as caught:
        admission.enter(0)
    assert 2.0 <= caught.value.retry_after_s <= 3.0
    clock.now_s += 10_000
    with pytest.raises(QueueFullError) as caught:
        admission.enter(0)
    assert caught.value.retry_after_s == 60.0


def test_nobody_is_let_in_while_there_is_a_reason() -> None:
    admission = make()
    admission.refuse = lambda: OctavoError("draining")
    with pytest.raises(OctavoError, match="draining"):
        admission.enter(0)
    assert books(admission) == (0, 0, 0)


def test_places_that_others_in_line_will_take_are_not_given_away() -> None:
    admission = make(3, 1000)
    with admission.enter(0):
        assert not admission.is_full(1) and admission.is_full(2)
        with pytest.raises(QueueFullError) as caught:
            admission.enter(0, has_room=False)
        assert caught.value.retry_after_s >= 1 and admission.num_refused == 1
        assert admission.num_requests == admission.num_sequences == 1
    loading = OctavoError("loading")
    admission.refuse = lambda: loading
    assert admission.is_full(0)
    assert not Admission().is_full(10**6)  # how much there is room for is not known yet

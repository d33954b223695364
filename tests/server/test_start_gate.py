"""Red when a burst of requests begins in one turn of the event loop, so that health checks and streams wait for all of
it; when the order of requests is lost; when one of them never begins."""

from __future__ import annotations

import asyncio

from octavo.server.start_gate import StartGate


def test_a_burst_begins_a_few_per_turn_and_others_come_between() -> None:
    begun: list[int] = []
    seen_by_others: list[int] = []

    async def burst() -> None:
        loop, gate = asyncio.get_running_loop(), StartGate(per_turn=3)
        for index in range(10):
            gate.put(loop, lambda index=index: begun.append(index))
        assert begun == [0, 1, 2]  # those that find a place begin at once
        while len(begun) < 10:
            await asyncio.sleep(0)
            seen_by_others.append(len(begun))

    asyncio.run(asyncio.wait_for(burst(), 10))
    assert begun == list(range(10))
    assert max(later - earlier for earlier, later in zip([3, *seen_by_others], seen_by_others, strict=False)) <= 3


def test_a_request_alone_never_waits() -> None:
    begun: list[int] = []

    async def one_by_one() -> None:
        loop, gate = asyncio.get_running_loop(), StartGate(per_turn=1)
        for index in range(5):
            gate.put(loop, lambda index=index: begun.append(index))
            assert begun[-1] == index
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(one_by_one(), 10))


def test_what_comes_later_stands_behind_what_waits() -> None:
    begun: list[str] = []

    async def twice() -> None:
        loop, gate = asyncio.get_running_loop(), StartGate(per_turn=2)
        for name in "abcde":
            gate.put(loop, lambda name=name: begun.append(name))
        await asyncio.sleep(0)
        gate.put(loop, lambda: begun.append("late"))
        while len(begun) < 6:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(twice(), 10))
    assert begun == [*"abcde", "late"]

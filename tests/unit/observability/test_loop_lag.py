"""Red when a loop that is held up does not show, or shows as one short moment."""

from __future__ import annotations

import asyncio
import time

from octavo.observability.loop_lag import LoopLag


def test_each_time_that_was_missed_is_counted() -> None:
    seen: list[float] = []

    async def held_up() -> None:
        watch = LoopLag(seen.append, interval_s=0.01)
        await asyncio.sleep(0.03)
        time.sleep(0.2)  # noqa: ASYNC251 - this is what is to be seen
        await asyncio.sleep(0.03)
        watch.stop()
        num_seen = len(seen)
        await asyncio.sleep(0.03)
        assert len(seen) == num_seen, "it was stopped"

    asyncio.run(held_up())
    assert max(seen) > 0.15
    assert sum(each > 0.05 for each in seen) >= 12  # of about 15: it was due every 10 ms

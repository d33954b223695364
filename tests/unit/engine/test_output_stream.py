"""Red when what one step gives thousands of readers holds up their event loop in one piece, when a reader is not told,
or when it is told twice of the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from octavo.engine.output_stream import TOLD_PER_TURN, Mailroom, OutputStream
from octavo.outputs import CompletionOutput, RequestOutput


def output(request_id: str, token_id: int, *, finished: bool = False) -> RequestOutput:
    answer = CompletionOutput(0, "x", [token_id], None, None, "length" if finished else None)
    return RequestOutput(request_id, None, [1], None, [answer], finished)


class Reader:
    """Notes what it is told, and when."""

    def __init__(self, told: list[str]) -> None:
        self.token_ids: list[list[int]] = []
        self._told = told

    def outputs_came(self, outputs: Sequence[RequestOutput]) -> None:
        self._told.append(outputs[0].request_id)
        self.token_ids.append(list(outputs[0].outputs[0].token_ids))

    def failed(self, error: BaseException) -> None:
        raise AssertionError(error)


def test_a_step_of_many_readers_leaves_room_for_others() -> None:
    count = 3 * TOLD_PER_TURN + 1
    told: list[str] = []
    turns: list[int] = []

    async def work() -> list[Reader]:
        room = Mailroom(asyncio.get_running_loop())
        streams = [
            OutputStream[RequestOutput]([str(index)], room, lambda _: None, is_delta=True) for index in range(count)
        ]
        readers = [Reader(told) for _ in streams]
        for stream, reader in zip(streams, readers, strict=True):
            stream.attach(reader, is_paused=False)
        room.post([(stream, output(stream.request_ids[0], 7)) for stream in streams])
        while not told:
            await asyncio.sleep(0)
        # The next step comes before all have been told of this one: the two become one for those.
        room.post([(stream, output(stream.request_ids[0], 8, finished=True)) for stream in streams])
        while any(stream.num_open for stream in streams):
            turns.append(len(told))
            await asyncio.sleep(0)
        return readers

    readers = asyncio.run(asyncio.wait_for(work(), 30))
    turns.append(len(told))
    assert max(later - earlier for earlier, later in zip(turns, turns[1:], strict=False)) <= TOLD_PER_TURN
    assert told[:count] == [str(index) for index in range(count)]
    assert all([token for each in reader.token_ids for token in each] == [7, 8] for reader in readers)
    assert len(readers[0].token_ids) == 2 and len(readers[-1].token_ids) == 1

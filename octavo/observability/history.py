"""What happened to a request and when: those in the books now, and the last few hundred that are not any more.

The scheduler's books write here, so that every frontend process can be told about every request. Holds times and
counts only, nothing of what was asked or answered. ``timeline.py`` makes the page that people see.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator

from octavo.messages import RequestTimeline

CAPACITY = 1000
"""Finished requests that are remembered, about 1 kB each."""
MAX_PREEMPTION_TIMES = 100
"""Preemptions of one request whose times are kept; all are counted."""
_PART = re.compile(r"(?:[#/]\d+)+")
_LAST_PART = re.compile(r"[#/]\d+\Z")


class RequestHistory:
    """Timelines of finished sequences, the oldest forgotten first.

    Args:
        capacity: Most sequences to remember, at least 1.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        assert capacity >= 1, capacity
        self._capacity = capacity
        self._finished: OrderedDict[str, RequestTimeline] = OrderedDict()

    def __len__(self) -> int:
        return len(self._finished)

    def add(self, timeline: RequestTimeline) -> None:
        """Remember a finished sequence; one of the same id is replaced."""
        self._finished.pop(timeline.request_id, None)
        self._finished[timeline.request_id] = timeline
        if len(self._finished) > self._capacity:
            self._finished.popitem(last=False)

    def find(self, request_id: str) -> list[RequestTimeline]:
        """The finished sequences of a request; see ``belongs_to``."""
        return [each for each in self._finished.values() if belongs_to(each.request_id, request_id)]


def belongs_to(sequence_id: str, request_id: str) -> bool:
    """Whether a sequence is the request of this id or a part of it: one of ``n`` answers (``id#0``), one of several
    prompts (``id/0``)."""
    if not sequence_id.startswith(request_id):
        return False
    rest = sequence_id[len(request_id) :]
    return not rest or _PART.fullmatch(rest) is not None


def names_of(sequence_id: str) -> Iterator[str]:
    """Ids of requests that a sequence ``belongs_to``: its own, and that without each of its last parts."""
    yield sequence_id
    while (part := _LAST_PART.search(sequence_id)) is not None:
        sequence_id = sequence_id[: part.start()]
        yield sequence_id

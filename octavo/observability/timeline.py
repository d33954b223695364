"""A request's life as a page for people: queued, scheduled, first token, preemptions, end, each with its time.

Takes what the engine's books say (``RequestTimeline``). The core's clock is the host's monotonic one, which every
process of the host shares; times of day are that clock plus what it differs by at the moment of asking.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from octavo.messages import RequestTimeline


def describe_timeline(request_id: str, sequences: Sequence[RequestTimeline]) -> dict[str, Any]:
    """The page as plain data.

    Args:
        request_id: As asked for.
        sequences: What the core knows of it, at least one.
    """
    offset_s = time.time() - time.monotonic()
    return {
        "object": "request.timeline",
        "id": request_id,
        "sequences": [_describe(each, offset_s) for each in sequences],
    }


def _describe(sequence: RequestTimeline, offset_s: float) -> dict[str, Any]:
    timings = sequence.timings
    moments = [("arrived", min(sequence.arrival_time_s - offset_s, timings.queued_s)), ("queued", timings.queued_s)]
    moments += [("scheduled", timings.scheduled_s)] if timings.scheduled_s else []
    moments += [("first_token", timings.first_token_s)] if timings.first_token_s else []
    moments += [("preempted", at) for at in timings.preempted_s] + [("resumed", at) for at in timings.resumed_s]
    moments += [("last_token", timings.last_token_s)] if timings.last_token_s and timings.finished_s else []
    moments += [("finished", timings.finished_s)] if timings.finished_s else []
    # Stable: of two moments at one reading of the clock, that which is named first above came first.
    moments.sort(key=lambda moment: moment[1])
    start_s = moments[0][1]
    return {
        "id": sequence.request_id,
        "status": sequence.status,
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": sequence.num_prompt_tokens,
        "cached_tokens": sequence.num_cached_tokens,
        "completion_tokens": sequence.num_output_tokens,
        "preemptions": timings.num_preemptions if timings.finished_s else len(timings.preempted_s),
        "events": [
            {"event": name, "time": round(at + offset_s, 6), "after_ms": round((at - start_s) * 1000, 3)}
            for name, at in moments
        ],
    }

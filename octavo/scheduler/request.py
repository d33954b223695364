"""Request: what the scheduler knows of one sequence that it has accepted, and its three states.

Only ``scheduler/`` writes here (``blocks`` is written by ``kv_cache/``). ``num_computed_tokens`` is confirmed,
``num_in_flight_tokens`` is planned and not yet come back; the tokens that exist on the device and are not known here
yet are derived: ``max(0, num_computed_tokens + num_in_flight_tokens - len(token_ids) + 1)``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from octavo.kv_cache.manager import SequenceBlocks
from octavo.messages import FinishReason, RequestTimings, ResolvedPooling, ResolvedSampling


class RequestStatus(enum.Enum):
    """Where a request is; it is in exactly one of these places."""

    WAITING = enum.auto()
    """Not on the device: new, or preempted."""
    RUNNING = enum.auto()
    """Owns a row and blocks."""
    FINISHED = enum.auto()
    """Not in the books any more; late results are dropped."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate."""

    request_id: str
    sampling: ResolvedSampling
    token_ids: list[int]
    """Prompt, then every confirmed output token."""
    num_prompt_tokens: int
    max_total_tokens: int
    """Prompt and output together; the request ends when it is this long."""
    min_total_tokens: int
    """No stop before it is this long."""
    stop_ids: frozenset[int]
    """End-of-sequence and stop ids together."""
    is_repetition_watched: bool
    """Whether every token must be looked at for ``repetition_detection``."""
    tenant: str
    priority: int
    arrival_index: int
    """Counts accepted requests: a smaller one came earlier."""
    blocks: SequenceBlocks
    timings: RequestTimings
    arrival_time_s: float
    """``time.time()`` in the frontend."""
    pooling: ResolvedPooling | None = None
    """Set for a request that ends with its prompt."""
    status: RequestStatus = RequestStatus.WAITING
    row: int = -1
    """Persistent row in every worker while RUNNING."""
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_cached_tokens: int = 0
    """Prefix hit of the first admission, for usage and billing."""
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0
    """Positions of the prompt whose logprobs have been delivered."""
    finish_reason: FinishReason | None = None

    @property
    def num_output_tokens(self) -> int:
        """Confirmed ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def may_read_prefix_cache(self) -> bool:
        """Prompt logprobs need every prompt position computed, until all of them have been delivered."""
        if self.sampling.skip_reading_prefix_cache:
            return False
        return self.sampling.prompt_logprobs is None or self.num_prompt_logprobs >= self.num_prompt_tokens - 1

"""Admission: room for requests, taken when a request's head has come and corrected when its size is known.

What is counted late lets a burst do all its work before it is refused. So a request holds room from its first moment:
one sequence, and the tokens that its length suggests, before a byte of it is parsed. Knows no HTTP and no engine; the
scheduler's own limits stand behind these.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from octavo.config.sections import SchedulerConfig
from octavo.errors import OctavoError, QueueFullError

NO_ROOM = "octavo.no_room"
"""Key in a scope's ``extensions``: those who came before this request, and have not begun yet, will take all room."""
BYTES_PER_TOKEN_GUESS = 4
MAX_RETRY_AFTER_S = 60.0
HISTORY = 64
"""Ends of sequences from which the pace is taken."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much may be open at once."""

    max_sequences: int
    """Running and waiting."""
    max_queued_tokens: int
    """Prompt tokens of requests that have not begun."""


def limits_for(config: SchedulerConfig, count: int = 1) -> AdmissionLimits:
    """Room for all that the engine runs at once and the queue behind it, or one of ``count`` equal shares of it."""
    sequences = config.max_num_seqs + config.max_num_queued_reqs
    return AdmissionLimits(math.ceil(sequences / count), math.ceil(config.max_num_queued_tokens / count))


class Ticket:
    """Room that one HTTP request holds. Closed by leaving it as a context, or by ``close``."""

    __slots__ = ("_admission", "_previous", "is_open", "num_sequences", "num_tokens")

    def __init__(self, admission: Admission, num_sequences: int, num_tokens: int) -> None:
        self._admission = admission
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens
        """Queued; 0 once the request has begun."""
        self.is_open = True
        self._previous: Ticket | None = None

    def started(self) -> None:
        """The engine has begun: its prompt waits no longer."""
        if self.is_open:
            self._admission.num_queued_tokens -= self.num_tokens
            self.num_tokens = 0

    def close(self) -> None:
        """The request is over, however it ended. May be called twice."""
        if self.is_open:
            self.is_open = False
            self._admission.give_back(self)

    def __enter__(self) -> Self:
        self._previous = _current.get()
        _current.set(self)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        _current.set(self._previous)
        self.close()


_current: ContextVar[Ticket | None] = ContextVar("octavo-ticket", default=None)
"""The ticket of the HTTP request that this task works for."""


class Admission:
    """The books of one HTTP process; used from its event loop only.

    Args:
        limits: None while they are not known: the engine's settings say.
        refuse: Called first for each request; an error out of it is why nobody is let in now.
        clock: ``time.monotonic``.
    """

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        refuse: Callable[[], OctavoError | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.refuse = refuse
        """See above; may be set later."""
        self._clock = clock
        self.num_requests = 0
        self.num_sequences = 0
        self.num_queued_tokens = 0
        self.num_refused = 0
        self._ends: deque[tuple[float, int]] = deque()
        self._num_ended = 0
        """Sequences in ``_ends``."""

    def is_full(self, num_before: int) -> bool:
        """Whether a request that stands behind ``num_before`` others will be refused."""
        limits = self.limits
        is_crowded = limits is not None and self.num_sequences + num_before >= limits.max_sequences
        return is_crowded or self.refuse() is not None

    def enter(self, num_bytes: int, *, has_room: bool = True) -> Ticket:
        """Take room for a request of which only the head is known.

        Args:
            num_bytes: Its declared length, 0 where none was.
            has_room: Whether those who stand before it leave any.

        Raises:
            QueueFullError: There is no room.
            OctavoError: What ``refuse`` says.
        """
        error = self.refuse()
        if error is not None:
            self.num_refused += 1
            raise error
        if not has_room:
            self.num_refused += 1
            raise QueueFullError(
                "all places that max_num_seqs and max_num_queued_reqs allow are taken",
                retry_after_s=self.retry_after_s(1),
            )
        ticket = Ticket(self, 1, num_bytes // BYTES_PER_TOKEN_GUESS + 1)
        self._take(ticket.num_sequences, ticket.num_tokens)
        self.num_requests += 1
        return ticket

    def reserve(self, *, num_sequences: int, num_prompt_tokens: int, tenant: str = "default") -> Ticket:  # noqa: ARG002
        """Correct the room of the request at hand, now that it is known how much it wants.

        Args:
            num_sequences: Prompts times ``n``.
            num_prompt_tokens: Of all prompts together.
            tenant: Whose request it is; not told apart yet.

        Raises:
            QueueFullError: There is not that much room.
        """
        ticket = _current.get()
        if ticket is None or not ticket.is_open:
            ticket = self.enter(0)
        self._take(num_sequences - ticket.num_sequences, num_prompt_tokens - ticket.num_tokens, ticket.num_tokens)
        ticket.num_sequences, ticket.num_tokens = num_sequences, num_prompt_tokens
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """A ticket was closed."""
        self.num_requests -= 1
        self.num_sequences -= ticket.num_sequences
        self.num_queued_tokens -= ticket.num_tokens
        self._ends.append((self._clock(), ticket.num_sequences))
        self._num_ended += ticket.num_sequences
        if len(self._ends) > HISTORY:
            self._num_ended -= self._ends.popleft()[1]

    def retry_after_s(self, num_sequences: int) -> float:
        """Seconds until so many more will probably have found room, by the pace of late; at least one."""
        if len(self._ends) < 2 or self.limits is None:
            return 1.0
        seconds = max(self._clock() - self._ends[0][0], 1e-3)
        pace = self._num_ended / seconds
        missing = max(1, self.num_sequences + num_sequences - self.limits.max_sequences)
        return float(min(MAX_RETRY_AFTER_S, max(1, math.ceil(missing / pace))))

    def _take(self, num_sequences: int, num_tokens: int, num_own_tokens: int = 0) -> None:
        limits = self.limits
        if limits is not None:
            if num_sequences > 0 and self.num_sequences + num_sequences > limits.max_sequences:
                self.num_refused += 1
                raise QueueFullError(
                    f"{self.num_sequences} sequences run or wait, and {num_sequences} more would exceed "
                    f"{limits.max_sequences}, the most that max_num_seqs and max_num_queued_reqs allow",
                    retry_after_s=self.retry_after_s(num_sequences),
                )
            # An empty queue takes any prompt: waiting would never help it.
            is_first = self.num_queued_tokens <= num_own_tokens
            if num_tokens > 0 and not is_first and self.num_queued_tokens + num_tokens > limits.max_queued_tokens:
                self.num_refused += 1
                raise QueueFullError(
                    f"{self.num_queued_tokens} prompt tokens wait, and {num_tokens} more would exceed "
                    f"max_num_queued_tokens ({limits.max_queued_tokens})",
                    retry_after_s=self.retry_after_s(1),
                )
        self.num_sequences += num_sequences
        self.num_queued_tokens += num_tokens

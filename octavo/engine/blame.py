"""Who may have ended an engine, who is not tried again, and when to give up: decisions only, no process and no thread.

An engine that ends takes all its requests with it, and at most one of them is the reason. Blame falls on those that
the engine had and had given nothing of yet, if there are any: a request that has just been let in is the likeliest
cause, one that has answered for minutes the least likely. After a death requests come back in small groups, so that a
second death points at few.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from octavo.config.sections import SchedulerConfig
from octavo.errors import QuarantinedError
from octavo.messages import EngineCoreRequest

MAX_REMEMBERED = 1024
"""Fingerprints; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How much is tried before giving up."""

    max_deaths: int = 3
    """The engine's so-manieth death within ``window_s`` is the last; 1 = it is never restarted."""
    window_s: float = 600.0
    max_strikes: int = 2
    """A request that was among the suspects of so many deaths is quarantined."""


class Suspect(Protocol):
    """What is asked of a request: ``replay.OpenRequest``."""

    @property
    def is_submitted(self) -> bool: ...
    @property
    def has_progress(self) -> bool: ...


S = TypeVar("S", bound=Suspect)


class Blame:
    """Counts deaths, remembers fingerprints.

    Attributes:
        is_careful: Whether requests are let in in small groups, since the engine has ended with them before.
    """

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._deaths: deque[float] = deque()
        self._quarantine: OrderedDict[bytes, float] = OrderedDict()
        self.is_careful = False

    def count_death(self, now_s: float) -> str | None:
        """Note a death; why it is the last one, None if it is not.

        Args:
            now_s: ``time.monotonic()``.
        """
        deaths, policy = self._deaths, self._policy
        deaths.append(now_s)
        while deaths[0] < now_s - policy.window_s:
            deaths.popleft()
        if len(deaths) < policy.max_deaths:
            return None
        if policy.max_deaths == 1:
            return "the engine ended and is not to be restarted"
        return f"the engine ended {len(deaths)} times within {policy.window_s / 60:g} minutes, the last time"

    def is_too_much(self, strikes: int) -> bool:
        """Whether a request with so many strikes is given up."""
        return strikes >= self._policy.max_strikes

    def suspects(self, requests: Sequence[S], config: SchedulerConfig) -> list[S]:
        """Those that an engine may have ended over.

        Args:
            requests: All unfinished ones, the oldest first.
            config: Tells how many can have run at most.
        """
        had = [each for each in requests if each.is_submitted]
        if config.policy == "fcfs":
            had = had[: config.max_num_seqs]  # the others still waited in its queue
        return [each for each in had if not each.has_progress] or had

    def remember(self, request: EngineCoreRequest, *, is_certain: bool) -> None:
        """A request has been given up. Its like is refused for a while, if it alone can have been the reason."""
        if is_certain:
            self._quarantine[fingerprint(request)] = time.monotonic() + self._policy.window_s
            while len(self._quarantine) > MAX_REMEMBERED:
                self._quarantine.popitem(last=False)

    def check(self, request: EngineCoreRequest) -> None:
        """Refuse what has ended the engine before.

        Raises:
            QuarantinedError: It has.
        """
        if not self._quarantine:
            return
        until_s = self._quarantine.get(fingerprint(request), 0.0)
        if time.monotonic() < until_s:
            raise QuarantinedError(
                f"the engine ended {self._policy.max_strikes} times over a request like this one; it is refused for "
                f"the next {until_s - time.monotonic():.0f} s"
            )


def fingerprint(request: EngineCoreRequest) -> bytes:
    """Equal for requests that ask the same of the engine, whoever asks and whatever the seed."""
    asked = (request.prompt_token_ids, msgspec.structs.replace(request.sampling, seed=0), request.lora_name)
    return hashlib.sha256(msgspec.msgpack.encode(asked)).digest()

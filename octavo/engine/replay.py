"""ReplayingClient: an EngineClient over a row of engine processes, of which one lives at a time.

It keeps what every unfinished request needs to go on: the request and the tokens that were delivered. When an engine
ends, another is started and is given all of them; whoever reads notices a pause. Each further part of a decision is
in a place of its own: how many deaths are too many and who is blamed in ``blame.py``, how a hung engine is found in
``watchdog.py``, what users see of all this in ``supervisor.py``. Never imports torch.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol, cast

import msgspec

from octavo.engine.blame import Blame, RestartPolicy
from octavo.engine.client import POLL_SLICE_S, EngineClient
from octavo.engine.launch import LaunchListener
from octavo.errors import EngineDeadError, EngineRestartingError, OctavoError, QuarantinedError
from octavo.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    EngineSnapshot,
    FinishReason,
    RequestTimings,
    Resumption,
)
from octavo.utils.logging import with_detail

logger = logging.getLogger(__name__)
FIRST_WAVE = 4
"""Requests that a new engine gets at first; then as many more as have shown that they do it no harm."""
RETRY_PAUSE_S = 1.0
"""Between a start that failed and the next one."""
_GAUGES = {"time_s", "num_running", "num_waiting", "num_blocks", "num_free_blocks", "num_cached_blocks"}

Launch = Callable[[LaunchListener], EngineClient]


class DeathListener(Protocol):
    """Who hears of the engine's deaths and births. Called from several threads; must not wait."""

    def engine_died(self, cause: str, num_open: int) -> None: ...
    def engine_restarted(self, ready: EngineReady, gap_s: float, num_open: int) -> None: ...
    def engine_ended(self, error: OctavoError) -> None:
        """For good."""
        ...


@dataclass(slots=True)
class OpenRequest:
    """A request that is not finished."""

    request: EngineCoreRequest
    submitted_s: float
    """``time.monotonic()``."""
    output_token_ids: list[int] = field(default_factory=list[int])
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    first_token_s: float = 0.0
    num_lives: int = 0
    """Engines that have had it."""
    is_submitted: bool = False
    """Whether the engine that lives now has it."""
    has_progress: bool = False
    """Whether that engine has given a token or prompt logprobs of it."""
    is_aborting: bool = False
    strikes: int = 0
    """Engines that ended while it was among the suspects."""

    @property
    def is_begun(self) -> bool:
        """Whether anything of it has been delivered."""
        return bool(self.output_token_ids) or self.num_prompt_logprobs > 0

    def note(self, output: EngineCoreOutput) -> None:
        """Take in what was delivered; correct what a later engine cannot know."""
        if output.new_token_ids:
            self.output_token_ids += output.new_token_ids
            self.has_progress = True
            if not self.first_token_s:
                self.first_token_s = time.monotonic()
        if output.prompt_logprobs is not None:
            self.num_prompt_logprobs += len(output.prompt_logprobs.token_ids)
            self.has_progress = True
        if self.num_lives > 1:
            # A hit on tokens that this request itself had produced is none for its owner.
            output.num_cached_tokens = self.num_cached_tokens
            if output.timings is not None:
                self._correct(output.timings)
        elif output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens

    def _correct(self, timings: RequestTimings) -> None:
        timings.queued_s = self.submitted_s
        if self.first_token_s:
            timings.first_token_s = min(timings.first_token_s or self.first_token_s, self.first_token_s)
            timings.scheduled_s = min(timings.scheduled_s, timings.first_token_s)

    def resumed(self) -> EngineCoreRequest:
        """As the next engine gets it."""
        if self.num_lives == 0:
            return self.request
        return msgspec.structs.replace(
            self.request, resumption=Resumption(list(self.output_token_ids), self.num_prompt_logprobs)
        )


class ReplayingClient:
    """An EngineClient that outlives its engines.

    Args:
        launch: Starts an engine process and waits until it takes requests.
        policy: When to give up, and on whom.
        listener: Is told of deaths and births.
        first: Who wants to hear of the first start; that happens in here.

    Raises:
        OctavoError: The first engine could not start.
    """

    def __init__(
        self, launch: Launch, policy: RestartPolicy, listener: DeathListener, first: LaunchListener | None = None
    ) -> None:
        self._launch = launch
        self._blame = Blame(policy)
        self._listener = listener
        self._changed = threading.Condition(threading.RLock())
        self._open: dict[str, OpenRequest] = {}
        self._held: deque[str] = deque()
        """Not given to the engine yet: there is none, or it shall show first that it stands those that it has."""
        self._unproven: set[str] = set()
        """Given to it while others were held, without a sign of progress so far."""
        self._made_up: deque[EngineCoreOutput] = deque()
        """Outputs that no engine will send."""
        self._base = EngineSnapshot(0.0)
        """Counters of the engines that have ended."""
        self._snapshot = EngineSnapshot(0.0)
        """The last of the engine that lives, as it sent it."""
        self._end: OctavoError | None = None
        self._is_closing = False
        self._starting: Any = None
        self._client: EngineClient | None = launch(self._listening(first or LaunchListener()))
        self._ready = self._client.ready

    # ------------------------------------------------------------------------------------------------ EngineClient

    @property
    def ready(self) -> EngineReady:
        """What the last engine found when it started."""
        return self._ready

    def submit(self, requests: list[EngineCoreRequest]) -> None:
        """Queue requests; those that come while there is no engine wait for the next one.

        Raises:
            EngineDeadError: There will be none.
            QuarantinedError: A request is one that has ended the engine twice.
        """
        with self._changed:
            self._check_alive()
            for request in requests:
                self._blame.check(request)
            now_s = time.monotonic()
            for request in requests:
                self._open[request.request_id] = OpenRequest(request, now_s)
                self._held.append(request.request_id)
            self._feed()

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> None:
        """See ``EngineClient.abort``. What no engine has is answered in here."""
        with self._changed:
            self._check_alive()
            found = [each for each in request_ids if each in self._open]
            if only_if_waiting and any(self._open[each].is_begun for each in found):
                return
            theirs = [each for each in found if self._open[each].is_submitted]
            ours = [each for each in found if not self._open[each].is_submitted]
            if only_if_waiting and theirs and ours:
                return  # some run or are about to
            if theirs and self._client is not None:
                self._tell(lambda client: client.abort(theirs, only_if_waiting=only_if_waiting))
                if not only_if_waiting:
                    for each in theirs:
                        self._open[each].is_aborting = True
            for each in ours:
                self._answer(each, FinishReason.ABORT)
            self._changed.notify_all()

    def recv(self, timeout_s: float | None) -> EngineCoreOutputs | None:
        """The next outputs, of whichever engine, or None when there are none within ``timeout_s`` seconds."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = POLL_SLICE_S if deadline_s is None else min(POLL_SLICE_S, max(0.0, deadline_s - time.monotonic()))
            with self._changed:
                if self._made_up:
                    outputs = EngineCoreOutputs(list(self._made_up))
                    self._made_up.clear()
                    return outputs
                self._check_alive()
                client = self._client
                if client is None:
                    self._changed.wait(left_s)
            if client is not None:
                try:
                    received = client.recv(left_s)
                except EngineDeadError as death:
                    self._bury(client, death)
                    continue
                if received is not None:
                    return self._note(received)
            if deadline_s is not None and time.monotonic() >= deadline_s and not self._made_up:
                return None

    def call(self, method: str, *args: Any) -> Any:
        """See ``EngineClient.call``.

        Raises:
            EngineRestartingError: There is no engine at the moment, and no answer without one.
        """
        with self._changed:
            self._check_alive()
            client = self._client
            if client is None and method == "snapshot":
                return self._total(self._snapshot)
        if client is None:
            raise EngineRestartingError("the engine is being restarted; try again in a moment")
        try:
            value = client.call(method, *args)
        except EngineDeadError as error:
            with self._changed:
                self._check_alive()
            raise EngineRestartingError("the engine has just ended and is being restarted") from error
        return self._total(value) if method == "snapshot" else value

    def close(self) -> None:
        """End the engine, or its start. May be called twice."""
        with self._changed:
            self._is_closing = True
            client, starting = self._client, self._starting
            self._changed.notify_all()
        if client is not None:
            client.close()
        elif starting is not None:
            starting.kill()

    # ------------------------------------------------------------------------------------------------- for watchers

    @property
    def client(self) -> EngineClient | None:
        """The client of the engine that lives; None while there is none."""
        return self._client

    @property
    def num_open(self) -> int:
        """Unfinished sequences."""
        return len(self._open)

    # ----------------------------------------------------------------------------------------------------- delivery

    def _note(self, received: EngineCoreOutputs) -> EngineCoreOutputs:
        with self._changed:
            for output in received.outputs:
                record = self._open.get(output.request_id)
                if record is None:
                    continue
                record.note(output)
                if output.finish_reason is not None:
                    del self._open[output.request_id]
                if self._unproven and (record.has_progress or output.finish_reason is not None):
                    self._unproven.discard(output.request_id)
            if self._held:
                self._feed()
            if received.snapshot is not None:
                self._snapshot = received.snapshot
                received.snapshot = self._total(received.snapshot)
        return received

    def _feed(self) -> None:
        """Give the engine what it may have by now. The lock is held."""
        while self._held and self._client is not None:
            request_id = self._held[0]
            record = self._open.get(request_id)
            if record is None:
                self._held.popleft()
                continue
            if self._blame.is_careful and not self._may_join(record):
                return
            self._held.popleft()
            request = record.resumed()
            if not self._tell(lambda client, request=request: client.submit([request])):
                self._held.appendleft(request_id)
                return
            record.is_submitted = True
            record.num_lives += 1
            if self._blame.is_careful:
                self._unproven.add(request_id)
        if not self._held and not self._unproven:
            self._blame.is_careful = False

    def _may_join(self, record: OpenRequest) -> bool:
        """Whether the engine gets one more while all those that it has since its start are not proven harmless."""
        if record.strikes and not record.output_token_ids:
            return not self._unproven  # the likeliest culprits alone, so that nobody shares their blame
        suspects = [self._open[each] for each in self._unproven if each in self._open]
        if any(each.strikes and not each.output_token_ids for each in suspects):
            return False
        num_proven = sum(each.has_progress for each in self._open.values())
        return len(suspects) < max(FIRST_WAVE, num_proven)

    def _tell(self, send: Callable[[EngineClient], None]) -> bool:
        """Whether the engine could be told; a death is ``recv``'s to notice."""
        assert self._client is not None
        try:
            send(self._client)
        except EngineDeadError:
            return False
        return True

    def _answer(self, request_id: str, reason: FinishReason, error: OctavoError | None = None) -> None:
        """A last output for a request that no engine has."""
        record = self._open.pop(request_id)
        output = EngineCoreOutput(request_id, [], finish_reason=reason, num_cached_tokens=record.num_cached_tokens)
        if error is not None:
            output.error, output.error_code = error.message, error.code
        self._made_up.append(output)

    # ------------------------------------------------------------------------------------------------- death, birth

    def _check_alive(self) -> None:
        if self._end is not None:
            raise EngineDeadError(self._end.message) from self._end
        if self._is_closing:
            raise EngineDeadError("the engine was closed")

    def _bury(self, client: EngineClient, death: EngineDeadError) -> None:
        """The engine has ended: put everything back, decide, and start another in a thread."""
        with self._changed:
            if self._is_closing:
                return
            self._client = None
            self._base = self._total(self._snapshot)
            self._snapshot = EngineSnapshot(self._snapshot.time_s)
        client.close()
        with self._changed:
            config = self._ready.config.scheduler
            suspects = self._blame.suspects(list(self._open.values()), config)
            self._put_back(suspects)
            num_open = len(self._open)
            self._changed.notify_all()
        self._listener.engine_died(death.message, num_open)
        if self._give_up(death):
            return
        threading.Thread(target=self._restart, args=(time.monotonic(),), name="octavo-restart", daemon=True).start()

    def _put_back(self, suspects: list[OpenRequest]) -> None:
        for record in suspects:
            record.strikes += 1
        for request_id, record in list(self._open.items()):
            if record.is_aborting:
                self._answer(request_id, FinishReason.ABORT)
            elif self._blame.is_too_much(record.strikes):
                self._blame.remember(record.request, is_certain=len(suspects) == 1)
                self._answer(
                    request_id,
                    FinishReason.ERROR,
                    QuarantinedError(
                        f"the engine ended {record.strikes} times while it worked on this request, so it is not tried "
                        "again"
                    ),
                )
            record.is_submitted = record.has_progress = False
        # First those that were well under way; last those of which no sign of life was seen before.
        order = sorted(self._open.items(), key=lambda each: (not each[1].output_token_ids, each[1].strikes))
        self._open = dict(order)  # the order in which the next engine gets them
        self._held = deque(self._open)
        self._unproven.clear()

    def _give_up(self, death: OctavoError) -> bool:
        """Count a death; whether it was one too many, in which case everybody hears of it."""
        verdict = self._blame.count_death(time.monotonic())
        if verdict is None:
            return False
        end = EngineDeadError(f"{verdict}: {death.message}")
        with self._changed:
            self._end = end
            self._changed.notify_all()
        self._listener.engine_ended(end)
        return True

    def _restart(self, died_s: float) -> None:
        """Body of a thread: start engines until one stands or one too many has failed."""
        while True:
            try:
                client = self._launch(self._listening(LaunchListener()))
            except Exception as error:  # border of the thread
                if self._is_closing:
                    return
                cause = error if isinstance(error, OctavoError) else EngineDeadError(f"{type(error).__name__}: {error}")
                first, rest = with_detail(cause.message)
                logger.error("the engine could not be restarted: %s", first, extra=rest)  # noqa: TRY400 - says it all
                if self._give_up(cause):
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closing, RETRY_PAUSE_S)
                continue
            with self._changed:
                is_wanted = not self._is_closing
                num_open = len(self._open)
                if is_wanted:
                    self._ready = client.ready
                    self._blame.is_careful = bool(self._held)
                    self._client = client
                    self._feed()
                    self._changed.notify_all()
            if is_wanted:
                self._listener.engine_restarted(client.ready, time.monotonic() - died_s, num_open)
            else:
                client.close()
            return

    def _listening(self, listener: LaunchListener) -> LaunchListener:
        """The same listener, and this client knows the process, to be able to end a start."""

        def note(process: Any) -> None:
            self._starting = process
            if self._is_closing:
                process.kill()
            if listener.on_process is not None:
                listener.on_process(process)

        return dataclasses.replace(listener, on_process=note)

    def _total(self, snapshot: EngineSnapshot) -> EngineSnapshot:
        """With the counters of the engines before."""
        return add_counters(self._base, snapshot)


def add_counters(base: EngineSnapshot, snapshot: EngineSnapshot) -> EngineSnapshot:
    """``snapshot`` with ``base`` added to everything that only grows."""
    changes: dict[str, Any] = {}
    for name in snapshot.__struct_fields__:
        before: Any = getattr(base, name)
        now: Any = getattr(snapshot, name)
        if name not in _GAUGES and before:
            changes[name] = _sum(before, now)
    return msgspec.structs.replace(snapshot, **changes)


def _sum(before: Any, now: Any) -> Any:
    """Of numbers, or of the numbers in two dicts or lists of which one may have more than the other."""
    if isinstance(now, dict):
        counts = Counter[str](cast("dict[str, int]", before))
        counts.update(cast("dict[str, int]", now))
        return dict(counts)
    if isinstance(now, list):
        pairs = zip_longest(cast("list[int]", before), cast("list[int]", now), fillvalue=0)
        return [first + second for first, second in pairs]
    return before + now

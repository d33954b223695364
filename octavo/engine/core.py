"""The engine loop: takes requests in, plans steps, keeps the device's queue filled, hands results out.

The only place where the scheduler (control half) and an executor (device half) meet. It knows no sockets and no
processes: messages come in through ``put`` (any thread) and go out through the ``emit`` that it was given. The process
around it is ``engine/core_main.py``; what stands at the other end is ``engine/client.py``.

``depth`` is the number of steps in flight: 1 is synchronous, 2 overlaps planning with the device's work.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import msgspec

from octavo.errors import OctavoError
from octavo.executor.executor import Executor
from octavo.messages import (
    AbortRequests,
    CoreCall,
    CoreInput,
    CoreOutput,
    CoreResult,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineSnapshot,
    FinishReason,
    ModelRunnerOutput,
    RequestTimeline,
    SchedulerOutput,
)

SNAPSHOT_INTERVAL_S = 0.25
"""At most four snapshots a second while steps are done, and one more on going idle."""
BOOKS_INTERVAL_S = 1.0
"""The books are checked when idle, but not more often: a check walks every block."""
IDLE_GRACE_S = 0.05
"""How long the engine must have had nothing to do before it looks at its books: keeps the check out of the way of
the next turn of a conversation."""


class PlansSteps(Protocol):
    """What the loop needs of ``scheduler.Scheduler``."""

    def add(self, request: EngineCoreRequest, /) -> None: ...
    def abort(self, request_ids: list[str], /, *, only_if_waiting: bool = False) -> list[EngineCoreOutput]: ...
    def schedule(self) -> SchedulerOutput | None: ...
    def update(self, plan: SchedulerOutput, result: ModelRunnerOutput, /) -> list[EngineCoreOutput]: ...
    def grammar_mask(self, plan: SchedulerOutput, /) -> bytes | None: ...
    def snapshot(self) -> EngineSnapshot: ...
    def timeline(self, request_id: str, /) -> list[RequestTimeline]: ...
    def find(self, request_ids: Collection[str], tenant: str | None, /) -> dict[str, list[str]]: ...
    def reset_prefix_cache(self) -> bool: ...
    def check_books(self) -> None: ...


def _nothing() -> None: ...


class InFlight(NamedTuple):
    """A step that the executor has and whose result is not applied yet."""

    plan: SchedulerOutput
    future: Future[ModelRunnerOutput]


class EngineCore:
    """The loop over one scheduler and one executor.

    Args:
        scheduler: Plans steps and applies their results.
        executor: Loaded, allocated and warm.
        depth: Steps in flight, at least 1.
        emit: Called as ``emit(client_index, message)`` from the loop's thread, for each message to a frontend.
        num_clients: Frontends; each gets every snapshot.
    """

    def __init__(
        self,
        scheduler: PlansSteps,
        executor: Executor,
        depth: int,
        emit: Callable[[int, CoreOutput], None],
        num_clients: int = 1,
    ) -> None:
        assert depth >= 1, depth
        self._scheduler = scheduler
        self._executor = executor
        self._depth = depth
        self._emit = emit
        self._num_clients = num_clients
        self._inbox: queue.SimpleQueue[CoreInput | None] = queue.SimpleQueue()
        self._in_flight: deque[InFlight] = deque()
        self._client_of: dict[str, int] = {}
        self._has_work = False  # False = the last look found nothing in flight and nothing to plan
        self._stopping = False
        self._snapshot_due_s = 0.0
        self._books_due_s = 0.0
        self._is_settled = True  # nothing was done since the last look at the books
        self._is_warm = False  # else the executor has something to do in idle moments
        self._on_step: Callable[[], None] = _nothing
        self._calls: dict[str, Callable[..., Any]] = {
            "abort_client": self._abort_client,
            "abort_named": self._abort_named,
            "check_books": scheduler.check_books,
            "ping": lambda: "pong",
            "reset_prefix_cache": scheduler.reset_prefix_cache,
            "snapshot": scheduler.snapshot,
            "timeline": self._timeline,
        }

    # ------------------------------------------------------------------------------------------ from other threads

    def put(self, message: CoreInput) -> None:
        """Hand in a message; from any thread. It is read before the next step is planned."""
        self._inbox.put(message)

    def add_call(self, method: str, function: Callable[..., Any]) -> None:
        """Offer one more method to ``CoreCall``; before the loop runs."""
        self._calls[method] = function

    def attach(self, *, num_clients: int, on_step: Callable[[], None]) -> None:
        """Tell who is around the loop; before it runs.

        Args:
            num_clients: Frontends.
            on_step: Called after each step, from the loop's thread.
        """
        self._num_clients = num_clients
        self._on_step = on_step

    def stop(self) -> None:
        """Make ``run`` return after the step at hand; from any thread, also from a signal handler."""
        self._stopping = True
        self._inbox.put(None)

    # --------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Work until ``stop``. An exception out of here means that the engine cannot go on."""
        while not self._stopping:
            self.run_once(None)

    def run_once(self, timeout_s: float | None) -> None:
        """One turn: read the inbox, then either give the device another step or apply the oldest result.

        Args:
            timeout_s: How long to wait for a message when there is nothing to do; None waits for ever, 0 never.
        """
        self._drain_inbox(timeout_s)
        if len(self._in_flight) < self._depth:
            plan = self._scheduler.schedule()
            if plan is not None:
                mask = None if plan.defer_sampling else self._scheduler.grammar_mask(plan)
                self._in_flight.append(InFlight(plan, self._executor.forward(plan, mask)))
                self._has_work = True
                return  # fill the device's queue first
        if self._in_flight:
            self._finish(self._in_flight.popleft())
            return
        if self._has_work:
            self._go_idle()

    def is_idle(self) -> bool:
        """Nothing in flight, nothing that could be planned, nothing unread."""
        return not self._has_work and self._inbox.empty()

    def shutdown(self) -> None:
        """Let go of the workers. Results still in flight are dropped."""
        self._in_flight.clear()
        self._executor.shutdown()

    # ---------------------------------------------------------------------------------------------------- details

    def _drain_inbox(self, timeout_s: float | None) -> None:
        if not self._has_work and self._inbox.empty() and not self._wait(timeout_s):
            return
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._has_work = True
            if message is not None:
                self._read(message)

    def _wait(self, timeout_s: float | None) -> bool:
        """Sleep until a message is there; whether one is. Looks at the books after a moment of rest, and lets the
        executor warm up further, piece by piece, where the wait has no end."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._is_settled:
            grace_s = max(IDLE_GRACE_S, self._books_due_s - time.monotonic())
            if self._peek(grace_s if timeout_s is None else min(timeout_s, grace_s)):
                return True
            if time.monotonic() >= self._books_due_s:
                self._scheduler.check_books()
                self._books_due_s = time.monotonic() + BOOKS_INTERVAL_S
                self._is_settled = True
        while not self._is_warm and deadline_s is None:
            if self._peek(IDLE_GRACE_S):
                return True
            self._is_warm = not self._executor.warm_up()
        return self._peek(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))

    def _peek(self, timeout_s: float | None) -> bool:
        try:
            message = self._inbox.get(block=timeout_s != 0, timeout=timeout_s or None)
        except queue.Empty:
            return False
        self._has_work = True
        if message is not None:
            self._read(message)
        return True

    def _read(self, message: CoreInput) -> None:
        if isinstance(message, EngineCoreRequest):
            self._add(message)
        elif isinstance(message, AbortRequests):
            self._deliver(self._scheduler.abort(message.request_ids, only_if_waiting=message.only_if_waiting))
        else:
            self._emit(message.client_index, self._answer(message))

    def _add(self, request: EngineCoreRequest) -> None:
        try:
            self._scheduler.add(request)
        except OctavoError as error:
            # Refused for itself alone: its owner hears about it, everybody else goes on.
            refusal = EngineCoreOutput(
                request.request_id,
                [],
                finish_reason=FinishReason.ERROR,
                error=error.message,
                error_code=error.code,
            )
            self._emit(request.client_index, EngineCoreOutputs([refusal]))
        else:
            self._client_of[request.request_id] = request.client_index

    def _answer(self, call: CoreCall) -> CoreResult:
        method = self._calls.get(call.method)
        if method is None:
            return CoreResult(call.call_id, error=f"InvalidRequestError: the engine has no method {call.method!r}")
        try:
            return CoreResult(call.call_id, value=method(*call.args))
        except (OctavoError, TypeError) as error:  # TypeError: wrong arguments, the caller's fault
            return CoreResult(call.call_id, error=f"{type(error).__name__}: {error}")

    def _timeline(self, request_id: str) -> Any:
        # Plain data: what runs goes on changing, also where a client shares this process.
        return msgspec.to_builtins(self._scheduler.timeline(request_id))

    def _abort_client(self, client_index: int) -> int:
        """A frontend is gone: end its requests, without a word to it. Returns how many there were."""
        request_ids = [each for each, index in self._client_of.items() if index == client_index]
        self._scheduler.abort(request_ids)
        for request_id in request_ids:
            del self._client_of[request_id]
        return len(request_ids)

    def _abort_named(self, request_ids: list[str], tenant: str | None) -> list[str]:
        """End requests of whichever frontend, which gets their last outputs. Returns the names that were known."""
        found = self._scheduler.find(request_ids, tenant)
        self._deliver(self._scheduler.abort(list({each: None for ids in found.values() for each in ids})))
        return list(found)

    def _finish(self, step: InFlight) -> None:
        result = step.future.result()  # waits for this step only, not for those queued behind it
        outputs = self._scheduler.update(step.plan, result)
        self._on_step()
        if self._in_flight and self._in_flight[0].plan.defer_sampling:
            waiting = self._in_flight[0].plan  # every token before its own is known now
            mask = self._scheduler.grammar_mask(waiting)
            self._executor.sample(waiting.step_id, mask)
        self._is_settled = False
        self._deliver(outputs, self._snapshot_if_due())

    def _go_idle(self) -> None:
        self._has_work = False
        snapshot = self._scheduler.snapshot()
        if snapshot.num_running or snapshot.num_waiting:
            # Nothing in flight, yet no plan: these requests would hang for ever. Better a loud end than that.
            raise RuntimeError(
                f"the scheduler plans nothing for {snapshot.num_running} running and {snapshot.num_waiting} waiting "
                f"requests with {snapshot.num_free_blocks} of {snapshot.num_blocks} blocks free"
            )
        if not self._is_settled:
            self._deliver([], snapshot)

    def _snapshot_if_due(self) -> EngineSnapshot | None:
        now_s = time.monotonic()
        if now_s < self._snapshot_due_s:
            return None
        self._snapshot_due_s = now_s + SNAPSHOT_INTERVAL_S
        return self._scheduler.snapshot()

    def _deliver(self, outputs: list[EngineCoreOutput], snapshot: EngineSnapshot | None = None) -> None:
        """Sort outputs by frontend and send each its own, and all of them the snapshot if there is one."""
        by_client: dict[int, list[EngineCoreOutput]] = {}
        for output in outputs:
            if output.finish_reason is None:
                client_index = self._client_of[output.request_id]
            else:
                client_index = self._client_of.pop(output.request_id)
            by_client.setdefault(client_index, []).append(output)
        receivers = set(by_client)
        if snapshot is not None:
            receivers.update(range(self._num_clients))
        for client_index in receivers:
            self._emit(client_index, EngineCoreOutputs(by_client.get(client_index, []), snapshot))

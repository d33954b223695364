"""ReplayingClient over engines that do what the test says: order, blame, corrections, aborts, counters."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.engine.blame import Blame, RestartPolicy, fingerprint
from octavo.engine.launch import LaunchListener
from octavo.engine.replay import ReplayingClient, add_counters
from octavo.errors import EngineDeadError, EngineRestartingError, OctavoError, QuarantinedError
from octavo.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    EngineSnapshot,
    FinishReason,
    Logprobs,
    RequestTimings,
)
from tests.unit.engine.fakes import READY, make_request
from tests.waiting import WAIT_S


class ScriptedEngine:
    """Keeps what it is given; answers what the test puts in."""

    def __init__(self) -> None:
        self.ready = READY
        self.requests: list[EngineCoreRequest] = []
        self.aborts: list[tuple[list[str], bool]] = []
        self.inbox: queue.SimpleQueue[EngineCoreOutputs | None] = queue.SimpleQueue()
        self.is_dead = False

    def submit(self, requests: list[EngineCoreRequest]) -> None:
        if self.is_dead:
            raise EngineDeadError("dead")
        self.requests += requests

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> None:
        self.aborts.append((request_ids, only_if_waiting))

    def recv(self, timeout_s: float | None) -> EngineCoreOutputs | None:
        try:
            item = self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if item is None:
            self.is_dead = True
            raise EngineDeadError("it fell over")
        return item

    def call(self, method: str, *args: Any) -> Any:
        if self.is_dead:
            raise EngineDeadError("dead")
        return EngineSnapshot(time.monotonic(), num_steps=1) if method == "snapshot" else method

    def close(self) -> None:
        self.is_dead = True

    @property
    def ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    def say(self, request_id: str, *token_ids: int, **fields: Any) -> None:
        self.inbox.put(EngineCoreOutputs([EngineCoreOutput(request_id, list(token_ids), **fields)]))


class World:
    """A client, its engines in the order of their starts, and what the listener heard."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.engines: list[ScriptedEngine] = []
        self.heard: list[tuple[Any, ...]] = []
        self.may_start = True
        self.client = ReplayingClient(self._launch, policy or RestartPolicy(), self)

    def _launch(self, _listener: LaunchListener) -> ScriptedEngine:  # type: ignore[override]
        while not self.may_start:
            time.sleep(0.005)
        self.engines.append(ScriptedEngine())
        return self.engines[-1]

    def engine_died(self, cause: str, num_open: int) -> None:
        self.heard.append(("died", cause, num_open))

    def engine_restarted(self, ready: EngineReady, gap_s: float, num_open: int) -> None:
        self.heard.append(("restarted", num_open))

    def engine_ended(self, error: OctavoError) -> None:
        self.heard.append(("ended", error.message))

    def take(self) -> list[EngineCoreOutput]:
        """All that comes within a moment."""
        found: list[EngineCoreOutput] = []
        while (received := self.client.recv(0.05)) is not None:
            found += received.outputs
        return found

    def die(self) -> list[EngineCoreOutput]:
        """The engine dies; what the client says itself until the next one is there."""
        count = len(self.engines)
        self.engines[-1].inbox.put(None)
        found = self.take()
        latest_s = time.monotonic() + WAIT_S
        while self.may_start and len(self.engines) == count:
            assert time.monotonic() < latest_s, "no engine was started after the death of one"
            found += self.take()
        return found + self.take()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.may_start = True
    world.client.close()


def test_the_next_engine_gets_what_was_delivered(world: World) -> None:
    world.client.submit([make_request("a", 9), make_request("b", 9)])
    world.engines[0].say("a", 5, 6)
    world.engines[0].say("a", 7)
    world.engines[0].say("b", prompt_logprobs=Logprobs([[1], [2]], [[0.0], [0.0]], [1, 1]))
    world.take()
    world.die()
    resumed = {request.request_id: request.resumption for request in world.engines[1].requests}
    assert resumed["a"] is not None and resumed["a"].output_token_ids == [5, 6, 7]
    world.engines[1].say("a", 8)
    world.take()  # a shows progress, so b may come
    resumed = {request.request_id: request.resumption for request in world.engines[1].requests}
    assert resumed["b"] is not None and resumed["b"].num_prompt_logprobs == 2
    assert world.heard[0] == ("died", "it fell over", 2) and world.heard[1] == ("restarted", 2)


def test_finished_and_aborted_requests_do_not_come_back(world: World) -> None:
    world.client.submit([make_request(name, 9) for name in ("done", "gone", "open")])
    world.engines[0].say("done", 1, finish_reason=FinishReason.STOP)
    world.take()
    world.client.abort(["gone"])
    assert world.engines[0].aborts == [(["gone"], False)]
    (answer,) = world.die()  # it died before it could answer the abort
    assert (answer.request_id, answer.finish_reason) == ("gone", FinishReason.ABORT)
    assert world.engines[1].ids == ["open"]


def test_usage_and_timings_are_those_of_the_whole(world: World) -> None:
    world.client.submit([make_request("a", 9)])
    begun_s = time.monotonic()
    world.engines[0].say("a", 5, num_cached_tokens=16)
    world.take()
    world.die()
    timings = RequestTimings(queued_s=begun_s + 100, scheduled_s=begun_s + 100, first_token_s=begun_s + 101)
    world.engines[1].say("a", 6, finish_reason=FinishReason.STOP, num_cached_tokens=64, timings=timings)
    (last,) = world.take()
    assert last.num_cached_tokens == 16
    assert last.timings is not None
    assert last.timings.queued_s <= begun_s + 1
    assert last.timings.first_token_s < begun_s + 100 and last.timings.scheduled_s <= last.timings.first_token_s


def test_they_come_back_in_waves_the_likeliest_culprits_last_and_alone(world: World) -> None:
    names = [f"good-{index}" for index in range(7)] + ["new-0", "new-1"]
    world.client.submit([make_request(name, 9) for name in names])
    for name in names[:7]:
        world.engines[0].say(name, 1)
    world.take()
    world.die()
    engine = world.engines[1]
    assert engine.ids == names[:4]
    engine.say("good-0", 2)
    world.take()
    assert engine.ids == names[:5]
    for name in names[1:7]:
        engine.say(name, 2)
        world.take()
    assert engine.ids == names[:8]  # new-0, and nobody beside it
    world.client.submit([make_request("late", 9)])
    assert "late" not in engine.ids
    engine.say("new-0", 1)
    world.take()
    engine.say("new-1", 1)
    world.take()
    assert engine.ids == [*names, "late"]
    world.client.submit([make_request("later", 9)])
    assert engine.ids[-1] == "later"  # trust is restored


def test_the_second_death_over_a_request_ends_it_and_bars_its_like(world: World) -> None:
    world.client.submit([make_request("good", 9), make_request("poison", 9, first=77)])
    world.engines[0].say("good", 1)
    world.take()
    world.die()
    world.engines[1].say("good", 2)
    world.take()
    assert world.engines[1].ids == ["good", "poison"]
    (answer,) = world.die()
    assert (answer.request_id, answer.error_code) == ("poison", "request_quarantined")
    assert world.engines[2].ids == ["good"]
    with pytest.raises(QuarantinedError, match="like this one"):
        world.client.submit([make_request("again", 9, first=77)])
    world.client.submit([make_request("other", 9, first=78)])


def test_without_an_engine_calls_say_so_aborts_are_answered_and_counters_stay(world: World) -> None:
    world.client.submit([make_request("a", 9)])
    world.engines[0].inbox.put(EngineCoreOutputs([], EngineSnapshot(1.0, num_steps=7, finished={"stop": 2})))
    received = world.client.recv(1)
    assert received is not None and received.snapshot is not None
    world.may_start = False
    world.die()
    with pytest.raises(EngineRestartingError):
        world.client.call("ping")
    assert world.client.call("snapshot").num_steps == 7
    world.client.abort(["a"], only_if_waiting=True)
    (answer,) = world.take()
    assert answer.finish_reason is FinishReason.ABORT and world.client.num_open == 0
    world.may_start = True
    while len(world.engines) == 1:
        world.take()
    world.engines[1].inbox.put(EngineCoreOutputs([], EngineSnapshot(2.0, num_steps=1, finished={"stop": 1})))
    received = world.client.recv(5)
    while received is not None and received.snapshot is None:
        received = world.client.recv(5)
    assert received is not None and received.snapshot is not None
    assert received.snapshot.num_steps == 8 and received.snapshot.finished == {"stop": 3}


def test_a_request_that_has_begun_is_not_taken_for_a_waiting_one(world: World) -> None:
    world.client.submit([make_request("a", 9)])
    world.client.abort(["a"], only_if_waiting=True)
    assert world.engines[0].aborts == [(["a"], True)]  # the engine decides
    world.engines[0].say("a", 1)
    world.take()
    world.client.abort(["a"], only_if_waiting=True)
    assert len(world.engines[0].aborts) == 1


def test_the_last_death_is_told_to_all(world: World) -> None:
    world.client.submit([make_request("a", 9)])
    world.engines[0].say("a", 1)
    world.die()
    world.engines[1].say("a", 1)
    world.die()
    # a was among the suspects twice: it has been answered, and nothing is left that could end the third engine.
    assert world.client.num_open == 0
    world.engines[2].inbox.put(None)
    with pytest.raises(EngineDeadError, match="3 times within 10 minutes, the last time: it fell over"):
        world.take()
    assert world.heard[-1][0] == "ended"
    with pytest.raises(EngineDeadError):
        world.client.submit([make_request("b", 9)])


def test_old_deaths_are_forgotten() -> None:
    blame = Blame(RestartPolicy(max_deaths=3, window_s=600))
    assert [blame.count_death(now_s) for now_s in (0, 500, 700, 1200)] == [None] * 4
    assert blame.count_death(1250) is not None


def test_a_fingerprint_is_of_what_is_asked_not_of_who_asks() -> None:
    assert fingerprint(make_request("a", 3)) == fingerprint(make_request("b", 3, client_index=1))
    assert fingerprint(make_request("a", 3)) != fingerprint(make_request("a", 4))
    assert fingerprint(make_request("a", 3)) != fingerprint(make_request("a", 3, first=9))


def test_counters_add_up_and_gauges_do_not() -> None:
    before = EngineSnapshot(5.0, num_running=3, num_steps=2, forward_ms=1.5, step_sizes=[1, 2], tenant_tokens={"a": 1})
    now = EngineSnapshot(9.0, num_running=1, num_steps=5, forward_ms=0.5, step_sizes=[4], tenant_tokens={"b": 2})
    both = add_counters(before, now)
    assert (both.time_s, both.num_running, both.num_steps, both.forward_ms) == (9.0, 1, 7, 2.0)
    assert both.step_sizes == [5, 2] and both.tenant_tokens == {"a": 1, "b": 2}

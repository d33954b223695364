"""The loop by itself: what it plans, when it waits, whom it tells."""

from __future__ import annotations

import threading
import time

import pytest

from octavo.engine.core import EngineCore
from octavo.messages import (
    AbortRequests,
    CoreCall,
    CoreOutput,
    CoreResult,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineSnapshot,
    FinishReason,
    SchedulerOutput,
)
from tests.unit.engine.fakes import REFUSE, CountingExecutor, CountingScheduler, make_request


class Engine:
    """A core whose messages are kept."""

    def __init__(self, depth: int = 1, step_s: float = 0.0, num_clients: int = 1) -> None:
        self.sent: list[tuple[int, CoreOutput]] = []
        self.scheduler = CountingScheduler()
        self.executor = CountingExecutor(step_s)
        self.core = EngineCore(
            self.scheduler, self.executor, depth, lambda index, message: self.sent.append((index, message)), num_clients
        )

    def work(self) -> None:
        """Until there is nothing to do."""
        self.core.run_once(0)
        while not self.core.is_idle():
            self.core.run_once(0)

    def outputs(self, client_index: int = 0) -> list[EngineCoreOutput]:
        return [
            output
            for index, message in self.sent
            if index == client_index and isinstance(message, EngineCoreOutputs)
            for output in message.outputs
        ]

    def snapshots(self, client_index: int = 0) -> list[EngineSnapshot]:
        return [
            message.snapshot
            for index, message in self.sent
            if index == client_index and isinstance(message, EngineCoreOutputs) and message.snapshot is not None
        ]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_keeps_exactly_depth_steps_in_flight(depth: int) -> None:
    # Red when the loop waits for a result although the device's queue has room, or queues more than it may.
    engine = Engine(depth, step_s=0.002)
    engine.core.put(make_request("a", max_tokens=8))
    engine.work()
    assert engine.executor.max_queued == depth
    assert [output.new_token_ids for output in engine.outputs()] == [[7 - i] for i in range(8)]
    assert engine.outputs()[-1].finish_reason is FinishReason.LENGTH


def test_outputs_go_to_the_frontend_that_asked() -> None:
    engine = Engine(num_clients=2)
    engine.core.put(make_request("a", client_index=0))
    engine.core.put(make_request("b", client_index=1))
    engine.work()
    assert {output.request_id for output in engine.outputs(0)} == {"a"}
    assert {output.request_id for output in engine.outputs(1)} == {"b"}
    assert engine.snapshots(0) == engine.snapshots(1) != []


def test_a_refusal_concerns_its_own_request_only() -> None:
    engine = Engine()
    engine.core.put(make_request("bad", first=REFUSE))
    engine.core.put(make_request("good", max_tokens=2))
    engine.work()
    refusal, *rest = engine.outputs()
    assert (refusal.request_id, refusal.finish_reason) == ("bad", FinishReason.ERROR)
    assert (refusal.error, refusal.error_code) == ("too long for this test", "context_length_exceeded")
    assert [output.request_id for output in rest] == ["good", "good"]


def test_an_aborted_request_is_answered_once_and_unknown_ids_are_ignored() -> None:
    engine = Engine(depth=2)
    engine.core.put(make_request("a", max_tokens=50))
    engine.core.run_once(0)
    engine.core.run_once(0)
    engine.core.put(AbortRequests(["a", "never heard of"]))
    engine.work()
    last = engine.outputs()[-1]
    assert (last.request_id, last.finish_reason) == ("a", FinishReason.ABORT)
    assert len(engine.outputs()) <= 3


def test_any_frontend_may_end_a_request_and_its_own_hears_of_it() -> None:
    engine = Engine(num_clients=2)
    engine.core.put(make_request("a", max_tokens=50, client_index=1))
    engine.core.put(make_request("b", max_tokens=5, client_index=1))
    engine.core.run_once(0)
    engine.core.put(CoreCall(7, "abort_named", [["a", "nobody"], None], client_index=0))
    engine.work()
    assert [message for index, message in engine.sent if index == 0 and isinstance(message, CoreResult)] == [
        CoreResult(7, value=["a"])
    ]
    ends = [(each.request_id, each.finish_reason) for each in engine.outputs(1) if each.finish_reason is not None]
    assert ends == [("a", FinishReason.ABORT), ("b", FinishReason.LENGTH)]


def test_calls_are_answered_between_steps_and_a_wrong_one_harms_nobody() -> None:
    engine = Engine()
    for call_id, (method, args) in enumerate(
        [("reset_prefix_cache", []), ("no_such_method", []), ("reset_prefix_cache", [1, 2]), ("__init__", [])]
    ):
        engine.core.put(CoreCall(call_id, method, args))
    engine.work()
    results = [message for _, message in engine.sent if isinstance(message, CoreResult)]
    assert results[0] == CoreResult(0, value=True)
    assert [result.error is None for result in results] == [True, False, False, False]
    assert "no_such_method" in (results[1].error or "")


def test_a_worker_exception_leaves_the_loop() -> None:
    engine = Engine()
    engine.core.put(make_request("a", first=666))
    with pytest.raises(RuntimeError, match="caught fire"):
        engine.work()


def test_snapshots_at_most_four_a_second_and_one_when_idle() -> None:
    engine = Engine()
    engine.core.put(make_request("a", max_tokens=500))
    begin_s = time.monotonic()
    engine.work()
    elapsed_s = time.monotonic() - begin_s
    assert len(engine.snapshots()) <= 2 + 4 * elapsed_s + 1
    assert engine.snapshots()[-1].num_running == 0
    assert engine.snapshots()[-1].num_steps == 500


def test_books_are_checked_once_at_rest() -> None:
    engine = Engine()
    engine.core.put(make_request("a"))
    engine.work()
    for _ in range(20):
        engine.core.run_once(0)
    assert engine.scheduler.num_book_checks == 1
    engine.scheduler.is_sound = False
    engine.core.put(make_request("b"))
    engine.work()
    with pytest.raises(AssertionError, match="held by nobody"):
        engine.core.run_once(2.0)


def test_an_idle_loop_uses_no_cpu_and_stops_when_told() -> None:
    # Red when idling polls: 0.5 s of a spinning loop costs 0.5 s of CPU.
    engine = Engine()
    used_s: list[float] = []

    def run() -> None:
        engine.core.run()
        used_s.append(time.thread_time())

    thread = threading.Thread(target=run)
    thread.start()
    engine.core.put(make_request("a"))
    time.sleep(0.5)
    engine.core.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert used_s[0] < 0.2
    assert engine.scheduler.num_book_checks == 1


def test_a_scheduler_that_forgets_a_request_is_found_out() -> None:
    # Red when the loop goes to sleep over requests that nobody will ever plan: their callers would hang.
    engine = Engine()
    engine.scheduler.schedule = lambda: None  # type: ignore[method-assign]
    engine.core.put(make_request("a"))
    with pytest.raises(RuntimeError, match="plans nothing for 1 running"):
        engine.work()


def test_a_deferred_plan_gets_its_mask_after_the_step_before_it() -> None:
    events: list[str] = []

    class Deferring(CountingScheduler):
        def schedule(self) -> SchedulerOutput | None:
            plan = super().schedule()
            if plan is None or plan.step_id == 1:
                return plan
            return SchedulerOutput(plan.step_id, [], [], plan.rows, [1], defer_sampling=True)

        def update(self, plan, result):  # type: ignore[no-untyped-def]
            events.append(f"update {plan.step_id}")
            return super().update(plan, result)

        def grammar_mask(self, plan: SchedulerOutput) -> bytes | None:
            return b"mask %d" % plan.step_id

    class Recording(CountingExecutor):
        def forward(self, plan, mask):  # type: ignore[no-untyped-def]
            events.append(f"forward {plan.step_id} {mask}")
            return super().forward(plan, mask)

        def sample(self, step_id: int, mask: bytes | None) -> None:
            events.append(f"sample {step_id} {mask}")

    core = EngineCore(Deferring(), Recording(), 2, lambda _index, _message: None)
    core.put(make_request("a", max_tokens=3))
    core.run_once(0)
    while not core.is_idle():
        core.run_once(0)
    assert events == [
        "forward 1 b'mask 1'", "forward 2 None", "update 1", "sample 2 b'mask 2'",
        "forward 3 None", "update 2", "sample 3 b'mask 3'", "update 3",
    ]  # fmt: skip


def test_an_idle_engine_prepares_piece_by_piece_and_answers_between() -> None:
    # Red when preparations hold up a message, are asked for while there is work, or go on for ever.
    engine = Engine()
    engine.executor.num_pieces = 10**9
    thread = threading.Thread(target=engine.core.run)
    thread.start()
    try:
        while engine.executor.num_pieces > 10**9 - 3:
            time.sleep(0.001)
        engine.core.put(make_request("a", 2))
        while not engine.outputs() or engine.outputs()[-1].finish_reason is None:
            time.sleep(0.001)
        engine.executor.num_pieces = 1
        while engine.executor.num_pieces > 0:
            time.sleep(0.001)
    finally:
        engine.core.stop()
        thread.join()
    assert engine.executor.num_pieces == 0

"""A scheduler and an executor of a few lines that count upwards, to test the loop and the clients around them.

The token at position p of a request is p. A prompt that starts with CRASH makes the executor raise, REFUSE makes the
scheduler refuse, UNSOUND makes the books wrong, EXIT ends the process without a word.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any

import msgspec

from octavo.config.engine import EngineConfig
from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import (
    CacheConfig,
    DeviceConfig,
    FrontendConfig,
    LoadConfig,
    ParallelConfig,
    SchedulerConfig,
)
from octavo.engine.core import EngineCore
from octavo.errors import CheckpointError, ConfigError, ContextLengthError, ModelNotFoundError
from octavo.messages import (
    CoreOutput,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineReady,
    EngineSnapshot,
    EngineStarting,
    FinishReason,
    ModelRunnerOutput,
    RequestTimeline,
    ResolvedSampling,
    SchedulerOutput,
)

CRASH, REFUSE, UNSOUND, EXIT = 666, 667, 668, 669


def make_request(request_id: str, max_tokens: int = 3, first: int = 1, client_index: int = 0) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id, [first, 2, 3], ResolvedSampling(max_tokens=max_tokens, seed=0), 0.0, client_index=client_index
    )


class CountingScheduler:
    def __init__(self) -> None:
        self.requests: dict[str, list[int]] = {}  # tokens still to plan, tokens not yet back
        self.prompts: dict[str, int] = {}
        self.plans: dict[int, list[str]] = {}
        self.num_steps = 0
        self.num_book_checks = 0
        self.is_sound = True

    def add(self, request: EngineCoreRequest) -> None:
        if request.prompt_token_ids[0] == REFUSE:
            raise ContextLengthError("too long for this test")
        self.is_sound = self.is_sound and request.prompt_token_ids[0] != UNSOUND
        done = 0 if request.resumption is None else len(request.resumption.output_token_ids)
        self.requests[request.request_id] = [request.sampling.max_tokens - done, request.sampling.max_tokens - done]
        self.prompts[request.request_id] = request.prompt_token_ids[0]

    def abort(self, request_ids: list[str], *, only_if_waiting: bool = False) -> list[EngineCoreOutput]:
        known = [request_id for request_id in request_ids if self.requests.pop(request_id, None) is not None]
        return [EngineCoreOutput(request_id, [], FinishReason.ABORT) for request_id in known]

    def schedule(self) -> SchedulerOutput | None:
        planned = [request_id for request_id, left in self.requests.items() if left[0]]
        if not planned:
            return None
        for request_id in planned:
            self.requests[request_id][0] -= 1
        self.num_steps += 1
        self.plans[self.num_steps] = planned
        return SchedulerOutput(self.num_steps, [], [], [self.prompts[each] for each in planned], [1] * len(planned))

    def update(self, plan: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        assert result.step_id == plan.step_id
        outputs: list[EngineCoreOutput] = []
        for request_id in self.plans.pop(plan.step_id):
            if request_id in self.requests:
                left = self.requests[request_id]
                left[1] -= 1
                reason = None if left[1] else FinishReason.LENGTH
                outputs.append(EngineCoreOutput(request_id, [left[1]], reason))
                if reason:
                    del self.requests[request_id]
        return outputs

    def grammar_mask(self, plan: SchedulerOutput) -> bytes | None:
        return None

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(time.monotonic(), num_running=len(self.requests), num_steps=self.num_steps)

    def timeline(self, request_id: str) -> list[RequestTimeline]:
        return []

    def find(self, request_ids: Collection[str], tenant: str | None) -> dict[str, list[str]]:
        return {each: [each] for each in request_ids if each in self.requests}

    def reset_prefix_cache(self) -> bool:
        return not self.requests

    def check_books(self) -> None:
        self.num_book_checks += 1
        if not self.is_sound:
            raise AssertionError("block 7 is held by nobody and not free")


class CountingExecutor:
    """Answers each step after ``step_s`` seconds, at once when 0; keeps the greatest number of steps it ever held."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.num_queued = 0
        self.max_queued = 0
        self.is_shut_down = False
        self.free_at_s = 0.0
        self.num_pieces = 0
        """Left to warm up."""

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        if CRASH in plan.rows:
            raise RuntimeError("the device caught fire")
        if EXIT in plan.rows:
            os._exit(7)
        self.num_queued += 1
        self.max_queued = max(self.max_queued, self.num_queued)
        future: Future[ModelRunnerOutput] = Future()
        self.free_at_s = max(time.monotonic(), self.free_at_s) + self.step_s

        def finish() -> None:
            self.num_queued -= 1
            future.set_result(ModelRunnerOutput(plan.step_id, [[0]] * len(plan.rows)))

        if self.step_s:
            threading.Timer(self.free_at_s - time.monotonic(), finish).start()
        else:
            finish()
        return future

    def sample(self, step_id: int, mask: bytes | None) -> None:
        raise AssertionError("no plan here defers its sampling")

    def start(self) -> Any: ...
    def allocate(self, num_blocks: int) -> None: ...

    def warm_up(self) -> bool:
        self.num_pieces -= 1
        return self.num_pieces > 0

    def shutdown(self) -> None:
        self.is_shut_down = True


CONFIG = EngineConfig(
    model=ModelConfig("FakeForCausalLM", 700, 8, 8, 1, 1, 1, 8, 64, 1e-5, RopeConfig(), hf={"a": [1, None]}),
    load=LoadConfig("fake", "/nowhere", "dummy", None, 0),
    device=DeviceConfig("cpu", "float32", "auto", "none", 1, True, 1),
    cache=CacheConfig(16, "float32", True, "sha256", 0.9, None, None),
    scheduler=SchedulerConfig(10**6, 64, 64, True, 0, "fcfs", 16, 1024, {"a": 2.0}),
    parallel=ParallelConfig(),
    frontend=FrontendConfig(("fake",), "/nowhere", True, None, 20, "raw_logprobs", {"temperature": 0.5}, 0),
)
READY = EngineReady(CONFIG, [], 8, 112, 1.75, 1, 2, 3, "none", {"load": 0.1}, 0.2)


class FakeArgs(msgspec.Struct):
    """Stands for EngineArgs."""

    error: str | None = None
    depth: int = 1
    step_s: float = 0.0
    disable_log_stats: bool | None = None


def build(args: FakeArgs, emit: Callable[[int, CoreOutput], None]) -> tuple[EngineCore, EngineReady]:
    match args.error:
        case "config":
            raise ConfigError("max_model_len is too large", param="max_model_len")
        case "not found":
            raise ModelNotFoundError("no such model")
        case "checkpoint":
            raise CheckpointError("model.gguf", "is cut off", tensor="output.weight")
        case "bug":
            raise KeyError("lost")
        case "exit":
            os._exit(9)
        case _:
            core = EngineCore(CountingScheduler(), CountingExecutor(args.step_s), args.depth, emit)
            core.add_call("pid", os.getpid)
            return core, READY


build.args_type = FakeArgs  # type: ignore[attr-defined]


def build_in_two_parts(args: FakeArgs, emit: Callable[[int, CoreOutput], None]) -> tuple[EngineCore, EngineReady]:
    emit(0, EngineStarting(CONFIG, []))
    return build(args, emit)


build_in_two_parts.args_type = FakeArgs  # type: ignore[attr-defined]

"""The scripts that measure the server: what they stand on, by hand, so that they run when a quiet machine is there."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from octavo.config.args import EngineArgs
from octavo.engine.core import EngineCore
from octavo.messages import CoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason, ResolvedSampling
from octavo.scheduler.scheduler import Scheduler
from tests.unit.cli.fake_server import FakeServer
from tests.unit.engine.fakes import CONFIG

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
W8_KEYS = {
    "seconds", "req_s", "output_tokens", "output_tok_s", "prompt_tokens", "chunks", "ttft_ms_mean", "ttft_ms_p50",
    "ttft_ms_p99", "itl_ms_mean", "itl_ms_p50", "itl_ms_p99", "client_cpu_share",
}  # fmt: skip
"""Of the rows of other engines that ours are set beside."""


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = BENCHMARKS / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_engine_without_a_model_answers_every_request_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when it samples in the middle of a chunked prompt, or forgets a token."""
    monkeypatch.setenv("FAKE_STEP_MS", "0")
    monkeypatch.setenv("FAKE_TOKEN_IDS", "7,8,9")
    executor = load("server/fake_executor.py", monkeypatch).FakeExecutor(CONFIG)
    report = executor.start()
    messages: list[EngineCoreOutputs] = []

    def emit(_client: int, message: CoreOutput) -> None:
        assert isinstance(message, EngineCoreOutputs)
        messages.append(message)

    # 64 tokens a step and a prompt of 150: it takes three chunks.
    core = EngineCore(Scheduler(CONFIG.scheduler, CONFIG.cache, report.kv_spec, 64), executor, 1, emit)
    for name, length in (("short", 3), ("long", 150)):
        core.put(EngineCoreRequest(name, [1] * length, ResolvedSampling(max_tokens=5, seed=0), 0.0))
    while not core.is_idle():
        core.run_once(0)
    tokens: dict[str, list[int]] = {"short": [], "long": []}
    for output in (each for message in messages for each in message.outputs):
        tokens[output.request_id] += output.new_token_ids
        assert output.finish_reason in (None, FinishReason.LENGTH)
    assert {name: len(ids) for name, ids in tokens.items()} == {"short": 5, "long": 5}
    assert {each for ids in tokens.values() for each in ids} == {7, 8, 9}


def test_w8_makes_rows_like_those_of_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = load("gpu/serve.py", monkeypatch)
    with FakeServer() as server:
        port = int(server.url.rsplit(":", 1)[1].partition("/")[0])
        options = argparse.Namespace(host="127.0.0.1", port=port, model="fake", prompt=9, output=6)
        row = asyncio.run(serve.load(options, 4, 2))
    assert set(row) == W8_KEYS
    assert (row["output_tokens"], row["prompt_tokens"], row["chunks"]) == (24, 36, 24)
    assert server.most_open <= 2
    asked = server.requests[0]
    assert len(asked["prompt"]) == 9 and asked["ignore_eos"] is True and asked["temperature"] == 0.6


def test_w8_tokenizer_has_a_text_for_nearly_every_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from octavo.frontend.tokenizer import load_tokenizer

    serve = load("gpu/serve.py", monkeypatch)
    monkeypatch.setattr(serve, "VOCAB_SIZE", 1000)
    serve.make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    assert tokenizer.vocab_size == 1000
    assert all(len(tokenizer.decode([index])) == 4 for index in range(256, 1000))


def test_the_flags_that_scripts_give_to_servers_exist() -> None:
    """Red when a flag of the scenarios is renamed: they would fail on the day they are needed."""
    EngineArgs(
        model="m", max_num_seqs=6000, max_num_batched_tokens=16384, max_num_queued_reqs=32,
        distributed_executor_backend="fake_executor:FakeExecutor", hf_overrides='{"max_position_embeddings": 1000000}',
    )  # fmt: skip


@pytest.mark.parametrize(("points", "expected"), [
    ([(0, 100.0), (5000, 101.0), (10_000, 102.0)], 2.0), ([(0, 50.0), (10_000, 50.0)], 0.0),
])  # fmt: skip
def test_memory_slope(points: list[tuple[int, float]], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("server/soak.py", monkeypatch).slope(points) == pytest.approx(expected)

"""The same behaviour through both clients: the engine in this process, and in a child over sockets."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import zmq

from octavo.engine.client import EngineClient, ZmqClient, join_steps
from octavo.engine.launch import launch_engine
from octavo.errors import CheckpointError, ConfigError, EngineDeadError, InvalidRequestError, ModelNotFoundError
from octavo.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineSnapshot,
    EngineStarting,
    FinishReason,
    Logprobs,
)
from tests.unit.engine.fakes import CONFIG, CRASH, EXIT, READY, REFUSE, UNSOUND, FakeArgs, make_request
from tests.waiting import WAIT_S, join

BUILD = "tests.unit.engine.fakes:build"
ROOT = Path(__file__).resolve().parents[3]


def launch(in_process: bool, args: FakeArgs | None = None) -> EngineClient:
    return launch_engine(args or FakeArgs(), in_process, build=BUILD)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _child_finds_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(params=[True, False], ids=["in-process", "process"])
def in_process(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def client(in_process: bool) -> Iterator[EngineClient]:
    client = launch(in_process)
    yield client
    client.close()


@pytest.fixture
def zmq_client() -> Iterator[ZmqClient]:
    client = launch(False)
    assert isinstance(client, ZmqClient)
    yield client
    client.close()


def collect(client: EngineClient, num_finished: int) -> list[EngineCoreOutput]:
    found: list[EngineCoreOutput] = []
    while sum(output.finish_reason is not None for output in found) < num_finished:
        outputs = client.recv(10)
        assert outputs is not None
        found += outputs.outputs
    return found


def num_tokens(outputs: list[EngineCoreOutput]) -> int:
    return sum(len(output.new_token_ids) for output in outputs)


def test_requests_run_and_refusals_come_back(client: EngineClient) -> None:
    assert client.ready == READY and client.ready.config == CONFIG
    client.submit([make_request("a", 2), make_request("bad", first=REFUSE), make_request("b", 3)])
    outputs = collect(client, 3)
    assert [each for output in outputs if output.request_id == "b" for each in output.new_token_ids] == [2, 1, 0]
    assert next(output for output in outputs if output.request_id == "bad").error == "too long for this test"


def test_recv_returns_none_when_nothing_comes(client: EngineClient) -> None:
    assert client.recv(0.01) is None
    assert client.recv(0) is None


def test_abort(client: EngineClient) -> None:
    client.submit([make_request("a", 10**6)])
    assert client.recv(10)
    client.abort(["a"])
    assert collect(client, 1)[-1].finish_reason is FinishReason.ABORT


def test_calls_with_and_without_another_thread_in_recv(client: EngineClient) -> None:
    assert client.call("reset_prefix_cache") is True
    assert isinstance(client.call("snapshot"), EngineSnapshot)
    with pytest.raises(InvalidRequestError, match="no_such"):
        client.call("no_such")
    stop = threading.Event()

    def pump() -> None:
        while not stop.is_set():
            client.recv(0.05)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        assert [client.call("ping") for _ in range(5)] == ["pong"] * 5
    finally:
        stop.set()
        join(thread)


def test_outputs_that_arrive_during_a_call_are_kept(client: EngineClient) -> None:
    client.submit([make_request("a", 5)])
    client.call("ping")
    client.call("ping")
    assert num_tokens(collect(client, 1)) == 5


def test_tokens_of_several_steps_are_one_output_and_all_else_stays_as_it_came() -> None:
    """Red when a token is lost or overtakes another, or one joins what has more to tell: logprobs, or an end."""
    position = Logprobs([[7]], [[-1.0]], [1])
    steps = [
        [EngineCoreOutput("a", [1], num_cached_tokens=3), EngineCoreOutput("b", [10], logprobs=position)],
        [EngineCoreOutput("a", [2, 3]), EngineCoreOutput("b", [11], logprobs=position)],
        [EngineCoreOutput("a", [4], FinishReason.LENGTH), EngineCoreOutput("b", [12])],
        [EngineCoreOutput("a", [5]), EngineCoreOutput("b", [13]), EngineCoreOutput("c", [], prompt_logprobs=position)],
        [EngineCoreOutput("c", [20])],
    ]
    snapshots = [None, EngineSnapshot(1.0), None, EngineSnapshot(2.0), None]
    joined = join_steps(EngineCoreOutputs(outputs, seen) for outputs, seen in zip(steps, snapshots, strict=True))
    assert [(each.request_id, each.new_token_ids) for each in joined.outputs] == [
        ("a", [1, 2, 3]), ("b", [10]), ("b", [11]), ("a", [4]), ("b", [12, 13]), ("a", [5]), ("c", []), ("c", [20]),
    ]  # fmt: skip
    assert joined.outputs[0].num_cached_tokens == 3
    assert joined.outputs[3].finish_reason is FinishReason.LENGTH
    assert joined.snapshot == EngineSnapshot(2.0)


def test_a_worker_exception_ends_the_engine_with_its_cause(client: EngineClient) -> None:
    client.submit([make_request("a", first=CRASH)])
    with pytest.raises(EngineDeadError, match="the device caught fire"):
        collect(client, 1)
    for use in (lambda: client.submit([make_request("b")]), lambda: client.recv(1), lambda: client.call("ping")):
        with pytest.raises(EngineDeadError, match="the device caught fire"):
            use()


def test_unsound_books_end_the_engine(client: EngineClient) -> None:
    client.submit([make_request("a", first=UNSOUND)])
    collect(client, 1)
    with pytest.raises(EngineDeadError, match="block 7"):
        for _ in range(50):
            client.recv(0.2)


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        ("config", ConfigError, "max_model_len is too large"),
        ("not found", ModelNotFoundError, "no such model"),
        ("checkpoint", CheckpointError, "model.gguf: tensor 'output.weight': is cut off"),
    ],
)
def test_start_up_errors_are_the_same_on_both_sides(
    in_process: bool, error: str, expected: type[Exception], words: str
) -> None:
    with pytest.raises(expected) as info:
        launch(in_process, FakeArgs(error))
    assert type(info.value) is expected
    assert str(info.value) == words
    if error == "config":
        assert info.value.param == "max_model_len"  # type: ignore[attr-defined]


def test_a_bug_or_a_silent_death_at_start_up_is_told() -> None:
    with pytest.raises(EngineDeadError, match="KeyError: 'lost'"):
        launch(False, FakeArgs("bug"))
    with pytest.raises(EngineDeadError, match="status 9"):
        launch(False, FakeArgs("exit"))


def test_on_starting_comes_before_ready(in_process: bool) -> None:
    seen: list[EngineStarting] = []
    client = launch_engine(FakeArgs(), in_process, seen.append, "tests.unit.engine.fakes:build_in_two_parts")  # type: ignore[arg-type]
    client.close()
    assert [message.config for message in seen] == [CONFIG]


def test_a_closed_client_refuses_and_closes_twice(client: EngineClient) -> None:
    client.close()
    client.close()
    with pytest.raises(EngineDeadError, match="closed"):
        client.submit([make_request("a")])


# ------------------------------------------------------------------------------------------------- the process alone


@pytest.mark.parametrize("cause", ["killed", "exits"])
def test_a_death_without_a_word_is_noticed_by_who_waits(zmq_client: ZmqClient, cause: str) -> None:
    if cause == "killed":
        zmq_client.process.kill()
    else:
        zmq_client.submit([make_request("a", first=EXIT)])
    with pytest.raises(EngineDeadError, match="signal 9" if cause == "killed" else "status 7"):
        while True:
            zmq_client.recv(None)


def test_random_bytes_are_dropped_and_counted(zmq_client: ZmqClient) -> None:
    # Red when the core's or the client's socket accepts anything but its own messages, or dies of it.
    (runtime_dir,) = {Path(address[6:]).parent for address in addresses(zmq_client)}
    assert runtime_dir.stat().st_mode & 0o777 == 0o700
    junk = [b"", b"\x00", b"\xff" * 100, os.urandom(1000), b"\x93\xa7request\x01\x02", b"\x91" * 100_000, b"pickle"]
    with zmq.Context() as context:
        for name in ("core", "client-0"):
            with context.socket(zmq.PUSH) as push:
                push.connect(f"ipc://{runtime_dir}/{name}")
                for data in junk:
                    push.send(data)
                push.close(linger=5000)
    with socket.socket(socket.AF_UNIX) as raw:  # not even ZeroMQ's own protocol
        raw.connect(f"{runtime_dir}/core")
        raw.sendall(random.Random(7).randbytes(10_000))
    zmq_client.submit([make_request("a", 3)])
    assert num_tokens(collect(zmq_client, 1)) == 3
    while zmq_client.call("num_dropped_messages") < len(junk) or zmq_client.num_dropped_messages < len(junk):
        zmq_client.recv(0.01)
    zmq_client.submit([make_request("b", 3)])
    assert num_tokens(collect(zmq_client, 1)) == 3


def addresses(client: ZmqClient) -> list[str]:
    return [client._inbound.LAST_ENDPOINT.decode(), client._outbound.LAST_ENDPOINT.decode()]


def test_the_process_ends_when_its_parent_does(zmq_client: ZmqClient) -> None:
    pid = zmq_client.call("pid")
    assert pid == zmq_client.process.pid
    zmq_client.process.stdin.close()  # type: ignore[union-attr]  # what the kernel does when a parent dies
    assert zmq_client.process.wait(10) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_process_cleanly(zmq_client: ZmqClient, signum: signal.Signals) -> None:
    zmq_client.submit([make_request("a", 10**6)])
    assert zmq_client.recv(10)
    zmq_client.process.send_signal(signum)
    assert zmq_client.process.wait(10) == 0
    with pytest.raises(EngineDeadError):
        for _ in range(10**6):
            zmq_client.recv(1)


def test_the_process_is_out_of_reach_of_the_terminals_ctrl_c(zmq_client: ZmqClient) -> None:
    assert os.getsid(zmq_client.process.pid) != os.getsid(0)


def test_an_idle_process_uses_no_cpu(zmq_client: ZmqClient) -> None:
    zmq_client.submit([make_request("a")])
    collect(zmq_client, 1)
    process = psutil.Process(zmq_client.process.pid)
    time.sleep(0.3)
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.05


def test_close_leaves_no_process_and_no_files() -> None:
    client = launch(False)
    assert isinstance(client, ZmqClient)
    runtime_dir = Path(addresses(client)[0][6:]).parent
    assert runtime_dir.exists()
    client.close()
    assert not runtime_dir.exists()
    assert client.process.returncode == 0


PARENT = """
import os, sys
from octavo.engine.launch import launch_engine
from tests.unit.engine.fakes import FakeArgs
client = launch_engine(FakeArgs(), False, build="tests.unit.engine.fakes:build")
print(client.process.pid, client._inbound.LAST_ENDPOINT.decode()[6:], flush=True)
if sys.argv[1] == "killed":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "ends without close"])
def test_nothing_is_left_of_an_engine_whose_parent_is_gone(end: str) -> None:
    # Red when a crashed or careless program leaves an engine behind, with gigabytes of memory.
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    pid, address = parent.stdout.readline().split()
    if end == "killed":
        assert psutil.pid_exists(int(pid))
        parent.kill()
    parent.wait(WAIT_S)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid)).wait(10)
    assert not Path(address).parent.exists()
    parent.stdin.close()
    parent.stdout.close()

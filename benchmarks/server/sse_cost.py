"""What a streamed token costs the HTTP process: from the engine's message to the bytes on their way to the socket.

Everything between the engine's socket and the kernel is real: what is kept for a restart, output processing,
detokenizing (with SmolLM2's tokenizer), the stream, the route's chunks. Two ends are replaced: the engine by prepared
step messages, and the connection, so that the figure is ours. ``--uvicorn`` adds the web server and its system calls,
with readers in a process of their own.

    python benchmarks/server/sse_cost.py                  # 64 streams, 400 tokens each
    python benchmarks/server/sse_cost.py --streams 1      # one token per step and stream: the dearest case
    python benchmarks/server/sse_cost.py --behind 5       # a flood: five steps are found at once, each time
    python benchmarks/server/sse_cost.py --profile        # where it goes

CPU time of this process (user and system): of all of it, and ``quick_us_per_token`` at the pace of the quickest tenth
of the messages, which a busy machine changes least. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import pstats
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from octavo.checkpoint.locate import locate_model
from octavo.config.server import ServerConfig
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.blame import RestartPolicy
from octavo.engine.client import _PumpedClient
from octavo.engine.frontend import Frontend
from octavo.engine.replay import ReplayingClient
from octavo.engine.wire import Reader
from octavo.errors import OctavoError
from octavo.frontend.tokenizer import load_tokenizer
from octavo.messages import (
    CoreInput,
    CoreOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    FinishReason,
)
from octavo.server.app import build_app
from octavo.server.connection_writer import extension_of
from octavo.server.protocol import limits_of, make_protocol
from octavo.server.service import Service
from octavo.utils.collector import Collector
from tests.unit.engine.fakes import READY

PROMPT = "Tell me of the sea."
BODY = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "temperature": 0, "max_tokens": 100_000}


class PreparedEngine(_PumpedClient):
    """An engine that has computed everything beforehand: one message per step for all requests.

    Args:
        num_streams: Requests to wait for before the first step.
        token_ids: What every request gets, one per step.
        vocab_size: Of the tokenizer.
        behind: Steps that are found at once.
    """

    def __init__(self, num_streams: int, token_ids: list[int], vocab_size: int, behind: int) -> None:
        super().__init__()
        config = READY.config
        self._ready = msgspec.structs.replace(
            READY,
            config=replace(
                config,
                model=replace(config.model, vocab_size=vocab_size),
                frontend=replace(config.frontend, skip_tokenizer_init=False, sampling_defaults={}),
            ),
        )
        self._num_streams = num_streams
        self._token_ids = token_ids
        self._behind = behind
        self._ids: list[str] = []
        self._reader: Reader[CoreOutput] = Reader(CoreOutput, "the benchmark")
        self._steps: deque[bytes] = deque()
        self.filled = threading.Event()
        self.released = threading.Semaphore(0)
        """One permit per message that may be delivered."""

    @property
    def ready(self) -> EngineReady:
        return self._ready

    def _send(self, message: CoreInput) -> None:
        if isinstance(message, EngineCoreRequest):
            self._ids.append(message.request_id)
            if len(self._ids) == self._num_streams:
                self._prepare()

    def _prepare(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        last = len(self._token_ids) - 1
        for step, token_id in enumerate(self._token_ids):
            reason = FinishReason.LENGTH if step == last else None
            outputs = [EngineCoreOutput(each, [token_id], reason) for each in self._ids]
            self._steps.append(encoder.encode(EngineCoreOutputs(outputs)))
        self.filled.set()

    def _pump(self, timeout_s: float) -> None:
        if self.filled.wait(timeout_s) and self.released.acquire(timeout=timeout_s):
            for _ in range(self._behind):
                message = self._reader.read(self._steps.popleft())
                assert message is not None
                self._take(message)

    def close(self) -> None:
        self._die("closed")


class _Deaf:
    """Hears nothing of deaths: there are none."""

    def engine_died(self, cause: str, num_open: int) -> None: ...
    def engine_restarted(self, ready: EngineReady, gap_s: float, num_open: int) -> None: ...
    def engine_ended(self, error: OctavoError) -> None: ...


def make_service(num_streams: int, num_tokens: int, behind: int) -> tuple[Service, PreparedEngine]:
    path = str(locate_model(None, None, None).path)
    tokenizer = load_tokenizer(path)
    text = "The sea is wide and blue, and nobody has counted its waves; but it is said that there are many. " * 100
    engine = PreparedEngine(num_streams, tokenizer.encode(text)[:num_tokens], len(tokenizer), behind)
    service = Service(config=ServerConfig())
    client = ReplayingClient(lambda _: engine, RestartPolicy(), _Deaf())
    service.engine = AsyncLLM(Frontend(client, tokenizer))
    return service, engine


class Connection:
    """A client that takes everything at once and counts it: what ``ConnectionWriter`` needs of uvicorn.

    Args:
        body: Of its request.
        on_write: Called for each piece.
    """

    def __init__(self, body: bytes, on_write: Callable[[int], None]) -> None:
        self.cycle: Any = self
        self.transport: Any = self
        self.flow: Any = self
        self.writer: Any = None
        self.disconnected = self.write_paused = False
        self.chunked_encoding: bool | None = None
        self.expected_content_length = 0
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
            "headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1",
            "scheme": "http", "root_path": "", "server": ("x", 80), "client": ("y", 1),
            "extensions": extension_of(self),
        }  # fmt: skip
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        self._on_write = on_write

    def resume_reading(self) -> None: ...

    def bound_buffers(self) -> None: ...

    def write(self, data: bytes) -> None:
        self._on_write(len(data))

    async def receive(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop()

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self._on_write(len(message["body"]))


async def run_in_process(app: Any, engine: PreparedEngine, num_streams: int, num_messages: int) -> dict[str, float]:
    raw = json.dumps(BODY).encode()
    num_writes, num_bytes, target = 0, 0, 1 << 62
    all_have_it = asyncio.Event()

    def on_write(size: int) -> None:
        nonlocal num_writes, num_bytes
        num_writes += 1
        num_bytes += size
        if num_writes >= target:
            all_have_it.set()

    connections = [Connection(raw, on_write) for _ in range(num_streams)]
    streams = [asyncio.create_task(app(each.scope, each.receive, each.send)) for each in connections]
    while not engine.filled.is_set():
        await asyncio.sleep(0.01)
    times = [time.process_time()]
    for _ in range(num_messages):
        # Every stream takes its tokens before the next step, as with an engine that computes.
        all_have_it.clear()
        target = num_writes + num_streams
        engine.released.release()
        await all_have_it.wait()
        times.append(time.process_time())
    await asyncio.gather(*streams)
    spent = time.process_time() - times[0]
    # Other work on the machine makes the same code slower by half, for moments: the quick messages tell of the code.
    quick = statistics.quantiles([after - before for before, after in pairwise(times)], n=10)[0] * num_messages
    return {"cpu_s": spent, "quick_cpu_s": quick, "writes": num_writes, "bytes": num_bytes}


def read_streams(port: int, num_streams: int) -> None:
    """Body of the readers' process."""

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        raw = json.dumps(BODY).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw)
        while await reader.read(65536):
            pass
        writer.close()

    async def run() -> None:
        await asyncio.gather(*(read() for _ in range(num_streams)))

    asyncio.run(run())


async def run_with_uvicorn(app: Any, engine: PreparedEngine, num_streams: int, num_messages: int) -> dict[str, float]:
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    protocol = make_protocol(limits_of(ServerConfig()))
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    readers = multiprocessing.get_context("spawn").Process(
        target=read_streams, args=(listener.getsockname()[1], num_streams)
    )
    readers.start()
    while not engine.filled.is_set():
        await asyncio.sleep(0.01)
    begin = time.process_time()
    for _ in range(num_messages):
        engine.released.release()
        await asyncio.sleep(0.01)
    while readers.is_alive():
        await asyncio.sleep(0.005)
    spent = time.process_time() - begin
    server.should_exit = True
    await serving
    return {"cpu_s": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="Per stream.")
    parser.add_argument("--behind", type=int, default=1, help="Steps that are found at once.")
    parser.add_argument("--uvicorn", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    num_messages = asked.tokens // asked.behind
    asked.tokens = num_messages * asked.behind
    service, engine = make_service(asked.streams, asked.tokens, asked.behind)
    run = run_with_uvicorn if asked.uvicorn else run_in_process
    profiler = cProfile.Profile()
    Collector(lambda: asked.streams).take_over()  # as the server does
    try:
        import uvloop

        loop_factory = uvloop.new_event_loop
    except ImportError:
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        if asked.profile:
            profiler.enable()
        found = runner.run(run(build_app(service), engine, asked.streams, num_messages))
        profiler.disable()
    total = asked.streams * asked.tokens
    found = {"streams": asked.streams, "tokens": total, "us_per_token": 1e6 * found["cpu_s"] / total, **found}
    if "quick_cpu_s" in found:
        found["quick_us_per_token"] = 1e6 * found["quick_cpu_s"] / total
    print(json.dumps({"sse_cost": found}))
    if asked.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    service.need_engine.shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    service.close()


if __name__ == "__main__":
    main()

"""Servers to ask: one in a thread over a tiny model with a real tokenizer, one as a process over the real model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.async_llm import AsyncLLM
from octavo.server.app import build_app
from octavo.server.protocol import limits_of, make_protocol
from octavo.server.service import Service
from tests.waiting import WAIT_S, stop_server, wait_until

CONTEXT = 256
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


@dataclass
class Server:
    """A server that listens."""

    url: str
    service: Service

    def client(self, **options: Any) -> httpx.Client:
        """To ask it with."""
        return httpx.Client(base_url=self.url, timeout=60, **options)


class _Quiet(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """None: this is a thread."""


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[AsyncLLM]:
    """A random model of one layer behind SmolLM2's tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    args = EngineArgs(
        model=str(folder), served_model_name=("tiny", "alias"), tokenizer=str(smollm2_gguf), load_format="dummy",
        dtype="float32", num_threads=1, max_model_len=CONTEXT, kv_cache_memory_bytes=16 << 20, max_num_seqs=8,
    )  # fmt: skip
    engine = AsyncLLM.from_engine_args(args, in_process=True)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def start_server(tiny_engine: AsyncLLM) -> Iterator[Callable[..., Server]]:
    """Serve the tiny model with some settings of the server."""
    running: list[tuple[uvicorn.Server, threading.Thread, Service]] = []

    def start(prepare: Callable[[Service], None] | None = None, **settings: Any) -> Server:
        service = Service(config=ServerConfig(**settings))
        service.engine = tiny_engine
        if prepare is not None:
            prepare(service)
        protocol = make_protocol(limits_of(service.config))
        config = uvicorn.Config(
            build_app(service), host="127.0.0.1", port=0, http=protocol, log_level="warning", lifespan="off"
        )
        server = _Quiet(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the server's start")
        port = server.servers[0].sockets[0].getsockname()[1]
        running.append((server, thread, service))
        return Server(f"http://127.0.0.1:{port}", service)

    yield start
    for server, thread, service in running:
        stop_server(server, thread)
        service.close()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """The tiny model behind default settings."""
    return start_server()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """For the default server."""
    with server.client() as found:
        yield found


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``octavo serve`` as a process of its own, over SmolLM2-135M; its base URL."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "octavo.cli.main", "serve", "--host", "127.0.0.1", "--port", "0",
               "--num-threads", "1", "--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        wait_until(
            lambda: process.poll() is not None or "Application startup complete." in log.read_text(),
            "the server's start",
        )
        assert process.poll() is None, log.read_text()
        found = re.search(r"Starting Octavo server on (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        yield found[1]
    finally:
        process.terminate()
        try:
            status = process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"the server did not end:\n{log.read_text()}") from None
        assert status == 0, log.read_text()

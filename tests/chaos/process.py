"""A real server in processes of its own, to be killed, stopped and terminated."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.chaos.client import ask
from tests.engine.conftest import TINY_CONFIG

WAIT_S = 240
"""Nothing is measured by this: a test that hangs shall end."""


def make_tiny_model(folder: Path) -> Path:
    """A folder with random weights behind SmolLM2's tokenizer: nonsense, but text, and quick to load."""
    config = {**TINY_CONFIG, "vocab_size": 49152, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ServerProcess:
    """``octavo serve`` with some flags.

    Args:
        flags: Beside address and port.
        log: Where its log goes.
        max_files: How many files each of its processes may have open.
    """

    def __init__(self, flags: list[str], log: Path, max_files: int | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.log = log
        program = "import sys; from octavo.cli.main import main; sys.exit(main(sys.argv[1:]))"
        if max_files is not None:
            limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({max_files}, {max_files}))"
            program = f"import resource; {limit}; {program}"
        command = [
            sys.executable, "-c", program,
            "serve", "--host", "127.0.0.1", "--port", str(self.port), "--disable-uvicorn-access-log", *flags,
        ]  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    async def until_ready(self) -> None:
        """Wait for /readyz."""
        await self.until(200, "/readyz")

    async def until(self, status: int, path: str) -> float:
        """Wait until a path answers with this status; how many seconds that took."""
        begin = time.monotonic()
        while time.monotonic() < begin + WAIT_S:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with suppress(OSError, asyncio.IncompleteReadError):
                if (await ask(self.port, path)).status == status:
                    return time.monotonic() - begin
            await asyncio.sleep(0.05)
        raise AssertionError(f"{path} never answered {status}:\n{self.tail()}")

    def engine_pid(self) -> int:
        """Of the engine process that lives."""
        found = self._children("octavo.engine.core_main")
        assert found, "there is no engine"
        return found[0]

    def workers(self) -> list[int]:
        """HTTP processes, where there are several."""
        return self._children("octavo.server.worker_main")

    def _children(self, module: str) -> list[int]:
        found: list[int] = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and module in child.cmdline():
                    found.append(child.pid)
        return found

    def dump_stacks(self) -> None:
        """All processes of the server write the stacks of their threads to the log."""
        workers = self.workers()
        for pid in (*(workers or [self.process.pid]), *self._children("octavo.engine.core_main")):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    async def kill_engine(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the engine; its id."""
        pid = self.engine_pid()
        os.kill(pid, number)
        return pid

    async def gauge(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        lines = (await ask(self.port, "/metrics")).body.decode().splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
        assert found, f"no metric {name}"
        return sum(found)

    async def until_idle(self) -> float:
        """Wait until the engine holds nothing any more; seconds that took."""
        begin = time.monotonic()
        left: dict[str, float] = {}
        while time.monotonic() < begin + WAIT_S:
            left = {
                name: await self.gauge(f"octavo:{name}")
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
            if not any(left.values()):
                return time.monotonic() - begin
            await asyncio.sleep(0.05)
        raise AssertionError(f"still held: {left}")

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(WAIT_S)

    def tail(self, num_lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def close(self) -> None:
        """End it, however it is."""
        family = [self.process.pid]
        with suppress(psutil.Error):
            family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(WAIT_S)


@contextmanager
def serving(flags: list[str], log: Path, max_files: int | None = None) -> Iterator[ServerProcess]:
    """A server that is ended in any case; afterwards none of its processes may be left."""
    server = ServerProcess(flags, log, max_files)
    try:
        yield server
    except BaseException:
        sys.stderr.write(server.tail() + "\n")
        raise
    finally:
        server.close()

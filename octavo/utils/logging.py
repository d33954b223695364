"""The log of a program that runs Octavo: one handler on the ``octavo`` logger, on stderr, coloured on a terminal.

Only the command line and the engine process call ``configure_logging``. In a program that imports Octavo as a library
nothing is configured: Python shows warnings and errors by itself, and the program may attach handlers as it likes.
Modules use ``logging.getLogger(__name__)``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import IO, Any

ROOT = "octavo"
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class LogFormatter(logging.Formatter):
    """``12:34:56 message``, with the level in front when it is not INFO, and the module's name at level DEBUG."""

    def __init__(self, *, colour: bool, name_modules: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._colour = colour
        self._name_modules = name_modules

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno != logging.INFO:
            text = f"{record.levelname}: {text}"
        if self._name_modules:
            text = f"[{record.name.removeprefix(ROOT + '.')}] {text}"
        stamp = self.formatTime(record, self.datefmt)
        if self._colour:
            shade = _COLOURS.get(record.levelno)
            stamp = f"{_DIM}{stamp}{_RESET}"
            text = f"{shade}{text}{_RESET}" if shade else text
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return f"{stamp} {text}"


def use_colour(stream: IO[Any]) -> bool:
    """Whether ``stream`` is a terminal and nobody asked for plain text (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def configure_logging(level: str = "info", stream: IO[Any] | None = None) -> None:
    """Send the log of this package to ``stream`` (default stderr). Calling again replaces the handler.

    Args:
        level: debug, info, warning, error or critical.
        stream: Where to write.
    """
    target: IO[Any] = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(LogFormatter(colour=use_colour(target), name_modules=level == "debug"))
    logger = logging.getLogger(ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False

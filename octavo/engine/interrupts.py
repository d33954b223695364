"""Ctrl-C at a moment that does no harm.

Python raises KeyboardInterrupt wherever the main thread happens to be; inside a step of an engine in this process
that would tear its books. Here the signal is only noted, and whoever steps the engine asks between two steps.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """Context in which the first Ctrl-C sets ``is_requested`` instead of raising. A second one raises at once.

    Does nothing outside the main thread, where no signal arrives, and where somebody else handles SIGINT.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._is_installed = False

    def __enter__(self) -> DeferredInterrupt:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_installed = True
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.is_requested:
            raise KeyboardInterrupt

"""How many steps an engine has finished, readable from outside even when the engine answers nobody.

Eight bytes in a file that both processes map: the engine's loop counts, whoever watches it reads. No message could
tell the same: an engine that hangs sends none. Knows no engine and no clock; what a standstill means is decided in
``watchdog.py``.
"""

from __future__ import annotations

import mmap
import signal
import struct
from pathlib import Path

_COUNT = struct.Struct("<Q")
DUMP_SIGNAL = signal.SIGUSR1
"""Makes an engine process print the stacks of all its threads to standard error."""


class Heartbeat:
    """The counter of one engine process.

    Args:
        path: A file of its own in the engine's runtime folder; made by the process that starts the engine.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _COUNT.size)
        self._count = 0

    @classmethod
    def create(cls, path: Path) -> Heartbeat:
        """A new counter at zero.

        Raises:
            FileExistsError: There is something at ``path``.
        """
        with path.open("xb") as file:
            file.write(_COUNT.pack(0))
        return cls(path)

    def beat(self) -> None:
        """One more step is done. For the engine only: it alone counts."""
        self._count += 1
        _COUNT.pack_into(self._map, 0, self._count)

    def read(self) -> int:
        """Steps so far."""
        return _COUNT.unpack_from(self._map, 0)[0]

    def close(self) -> None:
        """Let go of the mapping."""
        self._map.close()

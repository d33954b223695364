"""One sum over several frontend processes: each keeps its numbers in a file, whoever is asked adds them up.

A scrape reaches any one of the processes that listen on a port, and every one of them must answer for all. The folder
belongs to one server and is made anew at each start; a process that takes the place of one that died goes on from that
one's file, so that no counter ever falls. Counters of the engine are not here: every frontend gets those.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from octavo.observability.request_stats import RequestStats, StatsRecord

logger = logging.getLogger(__name__)
PUBLISH_INTERVAL_S = 1.0


class StatsShare:
    """The numbers of this process among those of its siblings.

    Args:
        record: What this process has counted since its start.
        folder: Private to this server; must exist.
        index: Of this process among the siblings.
    """

    def __init__(self, record: Callable[[], StatsRecord], folder: str, index: int) -> None:
        self._record = record
        self._folder = Path(folder)
        self._file = self._folder / f"stats-{index}.msgpack"
        self._inherited = _read(self._file)
        self._written: bytes = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish_regularly, name="octavo-stats", daemon=True)

    def start(self) -> None:
        """Publish once a second from now on, whenever something has changed."""
        self._try_to_publish()
        self._thread.start()

    def publish(self) -> None:
        """Write the file, unless nothing has changed. A reader sees the old one or the new one.

        Raises:
            OSError: It cannot be written.
        """
        data = msgspec.msgpack.encode(self._mine().record())
        if data == self._written:
            return
        fresh = self._file.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_bytes(data)
        fresh.replace(self._file)
        self._written = data

    def total(self) -> RequestStats:
        """All processes together, this one as of now, the others as of their last second."""
        total = self._mine()
        for file in sorted(self._folder.glob("stats-*.msgpack")):
            record = None if file == self._file else _read(file)
            if record is not None:
                total.merge(record)
        return total

    def close(self) -> None:
        """Publish a last time and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._try_to_publish()

    def _mine(self) -> RequestStats:
        mine = RequestStats()
        mine.merge(self._record())
        if self._inherited is not None:
            mine.merge(self._inherited)
        return mine

    def _publish_regularly(self) -> None:
        while not self._stop.wait(PUBLISH_INTERVAL_S):
            self._try_to_publish()

    def _try_to_publish(self) -> None:
        try:
            self.publish()
        except OSError as error:  # the disk is full, or the folder is gone: numbers are not worth a crash
            logger.debug("request statistics were not written: %s", error)


def _read(file: Path) -> StatsRecord | None:
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=StatsRecord)
    except (OSError, msgspec.DecodeError):
        return None

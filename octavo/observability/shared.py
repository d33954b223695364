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
        data = msgspec.msgpack.encode(self._mine())
        if data == self._written:
            return
        fresh = self._file.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_bytes(data)
        fresh.replace(self._file)
        self._written = data

    def total(self) -> RequestStats:
        """All processes together, this one as of now, the others as of their last second."""
        total = RequestStats()
        for record in (self._mine(), *self.others()):
            total.merge(record)
        return total

    def others(self) -> list[StatsRecord]:
        """What the siblings have counted, as of their last second."""
        files = sorted(file for file in self._folder.glob("stats-*.msgpack") if file != self._file)
        return [record for record in map(_read, files) if record is not None]

    def close(self) -> None:
        """Publish a last time and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._try_to_publish()

    def _mine(self) -> StatsRecord:
        record = self._record()
        if self._inherited is None:
            return record
        mine = RequestStats()
        mine.merge(self._inherited)
        mine.merge(record)
        return msgspec.structs.replace(mine.record(), num_open=record.num_open)  # what a dead process had open is gone

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

"""Journal of ``octavo run-batch``: every finished row is on disk before it counts as done, and is found again.

``OUTPUT.journal`` holds a line about the input, then a line per finished row in the order of finishing. It is appended
to only; a last line that was cut by a kill is cut off on resuming. When all rows are there, they are written to the
output in the order of the input, in one rename, and the journal goes. A lock keeps a second run away.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from octavo.errors import ConfigError

FORMAT = 1
SYNC_INTERVAL_S = 0.5
"""A kill of the process loses nothing that was written; a power cut at most this much of it."""


class Journal:
    """The journal beside an output file.

    Args:
        output: The output file; must not exist.
        digest: Of the input, to know it again.
        restart: Forget what an earlier run has done.

    Raises:
        ConfigError: The journal is another input's, another run holds it, or the folder cannot be written.
    """

    def __init__(self, output: str, digest: str, *, restart: bool = False) -> None:
        self._output = Path(output)
        self._path = Path(output + ".journal")
        self._places: dict[int, tuple[int, int]] = {}
        self.num_failed = 0
        """Finished rows without a good answer."""
        try:
            self._file = self._path.open("a+b")
        except OSError as error:
            raise ConfigError(
                f"output_file is {output!r}, but {self._path} cannot be written: {error.strerror}", param="output_file"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"another run writes {self._path} at this moment", param="output_file") from None
        if restart:
            self._file.truncate(0)
        self._end = self._load(digest)
        self._file.truncate(self._end)
        self._unsynced = threading.Event()
        self._stop = threading.Event()
        self._syncer = threading.Thread(target=self._sync_regularly, name="octavo-journal", daemon=True)
        if not self._end:
            self._append({"format": FORMAT, "input_sha256": digest})
            self.sync()
        self._syncer.start()

    @property
    def done(self) -> set[int]:
        """Lines of the input that are finished."""
        return set(self._places)

    @property
    def num_done(self) -> int:
        """How many those are."""
        return len(self._places)

    def add(self, line: int, row: dict[str, Any]) -> None:
        """A row is finished. It survives this process when the call returns, and the machine half a second later.

        Raises:
            OSError: It cannot be written.
        """
        self._places[line] = self._append({"line": line, "row": row})
        self.num_failed += is_failed(row)
        self._unsynced.set()

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._file.fileno())

    def finish(self, lines: Iterable[int]) -> None:
        """Write the output in this order and remove the journal. All rows must be there."""
        fresh = self._output.with_name(self._output.name + ".tmp")
        with fresh.open("wb") as out:
            for line in lines:
                out.write(_encode(self._read(*self._places[line])["row"]) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self._output)
        self._path.unlink()

    def close(self) -> None:
        """Bring all to the disk and let go of the file; what is finished stays for the next run."""
        self._stop.set()
        self._unsynced.set()
        self._syncer.join()
        self.sync()
        self._file.close()

    # ---------------------------------------------------------------------------------------------------- details

    def _append(self, entry: dict[str, Any]) -> tuple[int, int]:
        data = json.dumps(entry).encode("ascii") + b"\n"
        start = self._end
        # Unbuffered and whole: a kill leaves the line or a part of it, never lines in disorder.
        self._file.write(data)
        self._file.flush()
        self._end += len(data)
        return start, len(data)

    def _read(self, offset: int, size: int) -> dict[str, Any]:
        return json.loads(os.pread(self._file.fileno(), size, offset))

    def _load(self, digest: str) -> int:
        """Read what is there; returns where its good part ends."""
        self._file.seek(0)
        offset, good = 0, 0
        for data in self._file:
            entry = _entry(data)
            if offset == 0:
                if entry is None:
                    return 0
                if entry.get("input_sha256") != digest or entry.get("format") != FORMAT:
                    self._file.close()
                    raise ConfigError(
                        f"{self._path} belongs to another input (or this input has changed since): remove it, choose "
                        "another output_file, or begin anew with --restart",
                        param="output_file",
                    )
            elif entry is not None and isinstance(entry.get("line"), int) and isinstance(entry.get("row"), dict):
                self._places[entry["line"]] = (offset, len(data))
                self.num_failed += is_failed(entry["row"])
            offset += len(data)
            if data.endswith(b"\n"):
                good = offset
        return good

    def _sync_regularly(self) -> None:
        while not self._stop.is_set():
            self._unsynced.wait()
            self._unsynced.clear()
            self.sync()
            self._stop.wait(SYNC_INTERVAL_S)


def is_failed(row: dict[str, Any]) -> bool:
    """Whether an output row is an error's."""
    return row["response"] is None or row["response"]["status_code"] != 200


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can hold
        return json.dumps(row).encode()


def _entry(data: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(data)
    except ValueError:
        return None
    return cast("dict[str, Any]", entry) if isinstance(entry, dict) else None

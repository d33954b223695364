"""The result file of ``octavo bench workloads``: one JSON object a line, written at once, so that a killed run leaves
what it had. Knows what has been measured already; nothing of engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.cli.bench_limits import Ceilings


class ResultFile:
    """Rows that parent and child processes append to, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row here and to stdout."""
        line = json.dumps(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def read(self) -> list[dict[str, Any]]:
        """All rows; a last line that was cut is left out."""
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def ceilings(self) -> Ceilings | None:
        """What the device can do, once it was measured."""
        for row in self.read():
            if row["workload"] == "ceilings" and "error" not in row:
                return Ceilings.from_row(row)
        return None

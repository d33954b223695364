"""``octavo collect-env``: what a bug report should say about machine and installation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from octavo.cli.machine import (
    cpu_features,
    describe_environment,
    describe_machine,
    describe_source,
    describe_torch,
    describe_versions,
)
from octavo.config.flags import FlagParser
from octavo.utils.text import format_bytes


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = FlagParser(
        prog="octavo collect-env", description="Describe this machine and installation. Nothing is sent anywhere."
    )
    parser.add_argument("--json", action="store_true", help="As one JSON object.")
    namespace = parser.parse(argv)
    report = collect()
    if namespace.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(report, "")) + "\n")
    return 0


def collect() -> dict[str, Any]:
    """The whole report."""
    return {
        "machine": {**describe_machine(), "cpu_features": cpu_features()},
        "octavo": describe_source(),
        "versions": describe_versions(),
        "torch": describe_torch(),
        "environment": describe_environment(os.environ),
    }


def _lines(table: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            inner = _lines(cast("Mapping[str, Any]", value), indent + "  ")
            lines.extend([f"{indent}{name}:", *(inner or [f"{indent}  (none)"])])
            continue
        if name.endswith("_bytes") and isinstance(value, int):
            name, value = name.removesuffix("_bytes"), format_bytes(value)
        if isinstance(value, list):
            value = ", ".join(str(each) for each in cast("list[object]", value)) or "(none)"
        lines.append(f"{indent}{name}: {'-' if value is None else value}")
    return lines

"""All scenarios at full size, with figures: ``python -m tests.chaos.run [--json FILE] [--tiny]``.

Needs nothing but the package with its test extras; takes some minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from octavo.checkpoint.locate import locate_model
from tests.chaos import scenarios
from tests.chaos.process import ServerProcess, make_tiny_model, serving

Play = Callable[[ServerProcess], Coroutine[Any, Any, scenarios.Figures]]
QUICK_TO_NOTICE = ["--stall-timeout", "3", "--hang-timeout", "15"]


def plays(size: int) -> list[tuple[str, list[str], Play]]:
    """Name, further flags, scenario."""
    return [
        ("kill -9 of the engine", [], lambda server: scenarios.kill_under_streams(server, size, 150)),
        ("kill -9 of the engine, twice", [], lambda server: kill_twice(server, size)),
        ("clients vanish", [], lambda server: scenarios.vanishing_clients(server, 4 * size, 300)),
        ("SIGTERM under load", [], lambda server: scenarios.sigterm_under_load(server, size, 150)),
        ("second SIGTERM", [], scenarios.second_sigterm),
        ("hung engine", QUICK_TO_NOTICE, lambda server: scenarios.hung_engine(server, size, 150)),
        ("three deaths", [], scenarios.three_deaths),
        ("two HTTP processes", ["--api-server-count", "2"],
         lambda server: scenarios.several_http_processes(server, size, 100)),
        ("idle", [], lambda server: scenarios.idle_cpu(server, 10.0)),
    ]  # fmt: skip


async def kill_twice(server: ServerProcess, size: int) -> scenarios.Figures:
    """Two deaths within the life of one server; each request sees one of them."""
    first = await scenarios.kill_under_streams(server, size, 150)
    second = await scenarios.kill_under_streams(server, size, 150)
    return {name: max(value, second[name]) for name, value in first.items()}


def flags_for(folder: Path, *, tiny: bool) -> list[str]:
    model = str(make_tiny_model(folder)) if tiny else "smollm2-135m"
    tokenizer = str(locate_model("smollm2-135m").path)
    extra = ["--load-format", "dummy", "--tokenizer", tokenizer] if tiny else []
    return [model, "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "2048", *extra]


def main() -> int:
    """Play; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="Write the figures there.")
    parser.add_argument("--tiny", action="store_true", help="Random weights instead of SmolLM2.")
    parser.add_argument("--size", type=int, default=50, help="Streams at once.")
    parser.add_argument("--only", help="Part of a scenario's name.")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, more, play in plays(options.size):
        if options.only and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            flags = [*flags_for(Path(folder), tiny=options.tiny), *more]
            begin = time.monotonic()
            with serving(flags, Path(folder, "log")) as server:

                async def run(server: ServerProcess = server, play: Play = play) -> scenarios.Figures:
                    await server.until_ready()
                    return await play(server)

                try:
                    figures, outcome = asyncio.run(run()), "held"
                except AssertionError as error:
                    figures, outcome = {}, f"FAILED: {error}"
            rows.append({"scenario": name, "outcome": outcome, "seconds": time.monotonic() - begin, **figures})
        shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        sys.stdout.write(f"{name}: {outcome}. {shown}\n")
        sys.stdout.flush()
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["outcome"] != "held" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""``octavo run-batch``: answer a file of requests in OpenAI's batch format.

Each row goes through the server's own routes, without a socket, so that checks, answers and errors are the server's. A
row that is wrong gets an error of its own and disturbs no other. Finished rows are journalled at once
(``batch_journal.py``): the same command after a kill goes on where it stood. Rows that begin alike follow each other
(``batch_file.py``), so that the prefix cache serves them.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from octavo.cli.asgi_call import ASGIApp, post
from octavo.cli.batch_file import BadRowError, BatchFile, RowPlace
from octavo.cli.batch_journal import Journal, is_failed
from octavo.cli.common import CLEAR_LINE, add_output_flags, set_up, tell
from octavo.cli.exits import EXIT_ERROR, EXIT_INTERRUPTED
from octavo.config.args import EngineArgs
from octavo.config.env import apply_environment, read_environment
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from
from octavo.errors import ConfigError, EngineDeadError
from octavo.utils.text import format_count, format_seconds, plural

PROG = "octavo run-batch"
DESCRIPTION = """\
Answer a file of requests in OpenAI's batch format, one JSON object per line: {"custom_id": "a", "method": "POST",
"url": "/v1/chat/completions", "body": {...}}. A run that was killed goes on where it stood when started again."""
BATCH_APP = "octavo.cli.batch_app:EngineApp"
"""Imported when a batch runs: it takes the server's libraries along."""
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 0.5, 15.0
RATE_WINDOW_S = 60.0
FATAL_CODES = (EngineDeadError.code, "not_ready")
"""The server's word for "there is no engine": no fault of the row, which is left for the next run."""


class RunningApp(Protocol):
    """What answers rows."""

    @property
    def app(self) -> ASGIApp: ...
    @property
    def max_concurrency(self) -> int:
        """Rows that are worth having in flight."""
        ...

    def close(self) -> None: ...


MakeApp = Callable[[EngineArgs], RunningApp]


def main(argv: Sequence[str], make_app: MakeApp | None = None) -> int:
    """Run the command; returns the exit status: 0 when every row has its line in the output."""
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    output = namespace.output_file
    if Path(output).exists() and not namespace.overwrite:
        raise ConfigError(
            f"output_file is {output!r}, which exists already, complete: remove it, choose another, or give "
            "--overwrite",
            param="output_file",
        )
    args = engine_args_from(namespace)
    rows = BatchFile(namespace.input_file)
    journal = Journal(output, rows.digest, restart=namespace.restart)
    try:
        return _run(namespace, args, rows, journal, make_app)
    finally:
        journal.close()


def make_parser() -> FlagParser:
    """The command's flags."""
    parser = FlagParser(prog=PROG, description=DESCRIPTION)
    group = parser.add_argument_group("Batch")
    group.add_argument("-i", "--input-file", required=True, metavar="FILE", help="Requests, one JSON object per line.")
    group.add_argument(
        "-o", "--output-file", required=True, metavar="FILE",
        help="Answers, in the order of the input. While the batch runs they are in FILE.journal.",
    )  # fmt: skip
    group.add_argument(
        "--max-concurrency", type=_positive, metavar="N",
        help="Rows in flight at most. Default: what fills the engine and a bit of its queue.",
    )  # fmt: skip
    group.add_argument("--restart", action="store_true", help="Forget what an earlier run has done.")
    group.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")
    add_output_flags(parser)
    add_engine_flags(parser)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, but must be at least 1")
    return value


def _run(
    namespace: argparse.Namespace, args: EngineArgs, rows: BatchFile, journal: Journal, make_app: MakeApp | None
) -> int:
    done = journal.done
    places = [place for place in rows.in_order_of_prefix() if place.line not in done]
    if done and not namespace.quiet:
        tell(f"{plural(len(done), 'row')} of {format_count(len(rows.rows))} are done already, going on with the rest")
    if places:
        if make_app is None:
            module, _, name = BATCH_APP.partition(":")
            make_app = cast("MakeApp", getattr(importlib.import_module(module), name))
        running = make_app(apply_environment(args, read_environment(os.environ)))
        try:
            progress = Progress(len(rows.rows), journal, quiet=namespace.quiet)
            batch = Batch(rows, journal, running.app, progress)
            status = batch.run(places, namespace.max_concurrency or running.max_concurrency)
        finally:
            running.close()
        if status:
            return status
    journal.finish(place.line for place in rows.rows)
    if not namespace.quiet:
        failed = f", {format_count(journal.num_failed)} of them errors" if journal.num_failed else ""
        tell(f"{plural(len(rows.rows), 'row')} written to {namespace.output_file}{failed}")
    return 0


class Batch:
    """Rows on their way through an application."""

    def __init__(self, rows: BatchFile, journal: Journal, app: ASGIApp, progress: Progress) -> None:
        self._rows = rows
        self._journal = journal
        self._app = app
        self._progress = progress
        self._fatal: str | None = None

    def run(self, places: Sequence[RowPlace], concurrency: int) -> int:
        """Answer rows, at most so many at once, begun in this order; returns the exit status."""
        is_interrupted = asyncio.run(self._work(iter(places), concurrency))
        self._progress.end()
        if self._fatal is not None:
            sys.stderr.write(f"{PROG}: error: {self._fatal}\nRun the same command again to go on.\n")
            return EXIT_ERROR
        if is_interrupted:
            sys.stderr.write("interrupted; run the same command again to go on\n")
            return EXIT_INTERRUPTED
        return 0

    async def _work(self, places: Iterator[RowPlace], concurrency: int) -> bool:
        async def take_rows() -> None:
            for place in places:
                await self._answer(place)
                if self._fatal is not None:
                    return

        takers = [asyncio.create_task(take_rows()) for _ in range(concurrency)]
        shower = asyncio.create_task(self._progress.show())
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
        stopper = asyncio.create_task(stop.wait())
        finished = asyncio.gather(*takers)
        try:
            await asyncio.wait((finished, stopper), return_when=asyncio.FIRST_COMPLETED)
            if stopper.done() and not finished.done():
                finished.cancel()
                await asyncio.gather(*takers, return_exceptions=True)
                return True
            finished.result()  # what failed here is ours: a full disk, say
            return False
        finally:
            running: list[asyncio.Task[Any]] = [*takers, shower, stopper]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, place: RowPlace) -> None:
        request_id = f"batch_req_{uuid.uuid4().hex}"
        try:
            row = self._rows.read(place)
        except BadRowError as error:
            self._finish(place, _error_row(request_id, error))
            return
        status, body = await post(self._app, row.endpoint, row.body, request_id)
        if status != 200 and _code(body) in FATAL_CODES:
            if self._fatal is None:
                self._fatal = str(body["error"]["message"])
            return
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._finish(place, {"id": request_id, "custom_id": row.custom_id, "response": response, "error": None})

    def _finish(self, place: RowPlace, row: dict[str, Any]) -> None:
        self._journal.add(place.line, row)
        self._progress.count(row)


def _error_row(request_id: str, error: BadRowError) -> dict[str, Any]:
    return {
        "id": request_id,
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": error.code, "message": error.message},
    }


def _code(body: Any) -> str | None:
    if isinstance(body, dict):
        error = cast("dict[str, Any]", body).get("error")
        if isinstance(error, dict):
            return cast("dict[str, Any]", error).get("code")
    return None


@dataclass(frozen=True, slots=True)
class _Mark:
    time_s: float
    num_rows: int
    num_tokens: int


class Progress:
    """A line about how far the batch is, and when it will be finished.

    Args:
        num_rows: In the input.
        journal: Knows what is done, by earlier runs too.
        quiet: Show nothing.
    """

    def __init__(self, num_rows: int, journal: Journal, *, quiet: bool) -> None:
        self._num_rows = num_rows
        self._journal = journal
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._now = _Mark(time.monotonic(), 0, 0)
        self._marks: deque[_Mark] = deque([self._now])

    def count(self, row: dict[str, Any]) -> None:
        """A row is finished."""
        tokens = 0
        if not is_failed(row):
            body: dict[str, Any] = row["response"]["body"] or {}
            usage: dict[str, Any] = body.get("usage") or {}
            tokens = int(usage.get("total_tokens") or 0)
        self._now = _Mark(time.monotonic(), self._now.num_rows + 1, self._now.num_tokens + tokens)

    async def show(self) -> None:
        """Write the line now and then, until cancelled."""
        while not self._quiet:
            await asyncio.sleep(TERMINAL_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S)
            self._marks.append(_Mark(time.monotonic(), self._now.num_rows, self._now.num_tokens))
            while self._marks[-1].time_s - self._marks[0].time_s > RATE_WINDOW_S and len(self._marks) > 2:
                self._marks.popleft()
            if self._is_terminal:
                sys.stderr.write(CLEAR_LINE)
            tell(self.line(), end="\r" if self._is_terminal else "\n")

    def line(self) -> str:
        """How far it is; rates are those of the last minute."""
        first, last = self._marks[0], self._marks[-1]
        seconds = max(last.time_s - first.time_s, 1e-9)
        rate = (last.num_rows - first.num_rows) / seconds
        num_done = self._journal.num_done
        parts = [f"{format_count(num_done)} of {plural(self._num_rows, 'row')}"]
        if self._journal.num_failed:
            parts.append(f"{format_count(self._journal.num_failed)} failed")
        if rate > 0:
            parts.append(f"{rate:.2f} rows/s")
            parts.append(f"{(last.num_tokens - first.num_tokens) / seconds:,.0f} tokens/s")
            parts.append(f"{format_seconds((self._num_rows - num_done) / rate)} left")
        return " · ".join(parts)

    def end(self) -> None:
        """Leave the terminal's line as it was."""
        if self._is_terminal and not self._quiet:
            sys.stderr.write(CLEAR_LINE)

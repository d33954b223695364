"""``octavo bench workloads``: W1 to W6 and W9 to W12 on dummy weights, a JSON row for each run, within a time limit.

This process starts one engine process per model (``bench_run.py``) and outlives it: when a workload fails or the
engine dies, the row says why and the rest goes on in a fresh process. Rows are on disk as soon as they are measured.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import msgspec

from octavo.cli.bench_lists import DESCRIPTIONS, MAX_MODEL_LENS, MODEL_OF, OPTIONAL, WORKLOADS, write_model
from octavo.cli.bench_rows import ResultFile
from octavo.cli.bench_run import Task
from octavo.cli.common import add_output_flags, set_up, tell
from octavo.cli.machine import cpu_features, describe_machine, describe_source, describe_versions
from octavo.config.args import EngineArgs
from octavo.config.env import apply_environment, read_environment
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from, to_argv
from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean

SUMMARY = "Run the workloads W1 to W6 and W9 to W12 on dummy weights: a JSON row for each run, within a time limit."
RUN_MODULE, PROFILE_MODULE = "octavo.cli.bench_run", "octavo.cli.bench_profile"
_GRACE_S = 20.0
"""A child that has not ended so long after the deadline is killed: it hangs."""
_LEAST_START_S = 5.0
"""With less time left, no engine is started."""
_LOG_LINES = 40
RUN_ONCE = ("W6-prefill",)
"""A part of another workload, to tell its steps apart."""

Run = tuple[str, int]


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 when a workload failed."""
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    names = workload_names(namespace.workloads)
    if namespace.repeats < 1 or namespace.time_limit <= 0:
        raise ConfigError("--repeats must be at least 1 and --time-limit above 0", param="repeats")
    args = apply_environment(engine_args_from(namespace), read_environment(os.environ))
    if args.model is not None:
        raise ConfigError("model is given, but each workload has its own: leave it out", param="model")
    return Orchestrator(namespace, args, names, set(vars(namespace))).run(argv)


def make_parser() -> FlagParser:
    """The flags of the command."""
    parser = FlagParser(prog="octavo bench workloads", description=SUMMARY)
    group = parser.add_argument_group("Workload")
    listed = "; ".join(f"{name}: {DESCRIPTIONS[name]}" for name in DESCRIPTIONS)
    group.add_argument(
        "--workloads",
        default="all",
        metavar="NAMES",
        help=f"Which, with commas between. Default: all, which are W1 to W6. {listed}.",
    )
    group.add_argument("--output-dir", default="bench-results", metavar="DIR", help="Where results and logs go.")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="Runs of each workload. Default: 3.")
    group.add_argument(
        "--time-limit", type=float, default=600.0, metavar="SECONDS",
        help="Begin nothing after that; what did not fit is written as skipped. Default: 600.",
    )  # fmt: skip
    group.add_argument(
        "--run-limit", type=float, default=120.0, metavar="SECONDS", help="End a single run after that. Default: 120."
    )
    group.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny: small models and lists, to try the machinery."
    )
    group.add_argument(
        "--profile", action="store_true",
        help="Afterwards write times of single steps, and tables of the kernels of a decode and a prefill step.",
    )  # fmt: skip
    group.add_argument("--profile-only", action="store_true", help="Only that.")
    add_output_flags(parser)
    add_engine_flags(parser)
    return parser


def workload_names(text: str) -> list[str]:
    """Names in the order in which they are run.

    Raises:
        ConfigError: One is unknown.
    """
    everything = [name for name in WORKLOADS if name not in OPTIONAL]
    asked = everything if text == "all" else [each.strip() for each in text.split(",")]
    for name in asked:
        if name not in WORKLOADS:
            raise ConfigError(
                f"workloads is {text!r}, but there is no {name!r}.{did_you_mean(name, WORKLOADS)} There are "
                f"{', '.join(DESCRIPTIONS)}.",
                param="workloads",
            )
    return [name for name in WORKLOADS if name in asked]


class Orchestrator:
    """Starts engine processes, one after the other, until everything has a row or time is up.

    Args:
        namespace: The command's flags.
        args: The engine settings asked for.
        names: Workloads.
        given: Settings that were given outright; others take the values of the peers' runs.
    """

    def __init__(self, namespace: argparse.Namespace, args: EngineArgs, names: Sequence[str], given: set[str]) -> None:
        self._options = namespace
        self._args = args
        self._names = names
        self._given = given
        self._folder = Path(namespace.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._results = ResultFile(self._folder / "results.jsonl")
        self._deadline_s = time.monotonic() + namespace.time_limit
        self._num_starts = 0

    def run(self, argv: Sequence[str]) -> int:
        """Measure everything; returns the exit status."""
        if self._results.path.exists():
            raise ConfigError(
                f"output_dir is {str(self._folder)!r}, which holds results already: give another", param="output_dir"
            )
        self._results.append(_environment(argv))
        models = dict.fromkeys(MODEL_OF[name] for name in self._names)
        if not self._options.profile_only:
            for model in models:
                self._run_model(model)
        if self._options.profile or self._options.profile_only:
            for model in models:
                self._profile(model)
        rows = self._results.read()
        for line in summarise_rows(rows):
            tell(line)
        return 1 if any("error" in row for row in rows) else 0

    def _run_model(self, model: str) -> None:
        names = [name for name in self._names if MODEL_OF[name] == model]
        runs: list[Run] = [
            (name, number + 1)
            for number in range(self._options.repeats)
            for name in names
            if number == 0 or name not in RUN_ONCE
        ]
        failed: set[str] = set()
        while True:
            seen = {(row["workload"], row.get("run")) for row in self._results.read()}
            left = [run for run in runs if run not in seen and run[0] not in failed]
            if not left:
                return
            if self._deadline_s - time.monotonic() < _LEAST_START_S:
                for name, number in left:
                    self._results.append({"model": model, "workload": name, "run": number, "skipped": "time is up"})
                return
            before = len(self._results.read())
            ending = self._spawn(RUN_MODULE, model, left)
            rows = self._results.read()[before:]
            if any(row["workload"] == "start" and "error" in row for row in rows):
                return
            failed |= {row["workload"] for row in rows if "error" in row}
            if ending and not any("error" in row for row in rows):
                # It died or hung without a word: the run without a row did it.
                done = {(row["workload"], row.get("run")) for row in rows}
                name, number = next((run for run in left if run not in done), left[-1])
                self._results.append({"model": model, "workload": name, "run": number, "error": ending})
                if not any(row["workload"] == "start" for row in rows):
                    return
                failed.add(name)

    def _profile(self, model: str) -> None:
        if self._deadline_s - time.monotonic() < _LEAST_START_S:
            self._results.append({"model": model, "workload": "profile", "skipped": "time is up"})
            return
        ending = self._spawn(PROFILE_MODULE, model, [])
        if ending:
            self._results.append({"model": model, "workload": "profile", "error": ending})

    def _engine_argv(self, model: str) -> list[str]:
        wanted: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LENS[model],
            "gpu_memory_utilization": 0.9, "enable_prefix_caching": False, "seed": 0,
        }  # fmt: skip
        if self._options.scale == "tiny":
            wanted |= {"max_model_len": 1024, "num_gpu_blocks_override": 512}
        changes = {name: value for name, value in wanted.items() if name not in self._given}
        path = write_model(self._folder / "models", model, self._options.scale)
        return to_argv(replace(self._args, model=str(path), served_model_name=(model,), **changes))

    def _spawn(self, module: str, model: str, runs: list[Run]) -> str:
        """Run one child to its end; returns how it ended when that was not in good order."""
        self._num_starts += 1
        log_path = self._folder / f"{module.rpartition('.')[2]}-{model}-{self._num_starts}.log"
        task = Task(
            model=model, engine_argv=self._engine_argv(model), results=str(self._results.path),
            scale=self._options.scale, runs=runs, spawned_s=time.monotonic(), deadline_s=self._deadline_s,
            run_limit_s=self._options.run_limit, start_number=self._num_starts,
        )  # fmt: skip
        with log_path.open("wb") as log:
            child = Popen([sys.executable, "-m", module, msgspec.json.encode(task).decode()], stderr=log)
            try:
                child.wait(max(0.0, self._deadline_s - time.monotonic()) + _GRACE_S)
            except TimeoutExpired:
                how = "it hung and was killed"
                child.send_signal(signal.SIGUSR1)  # all its stacks go to the log
                time.sleep(1)
            else:
                how = f"it ended with status {child.returncode}" if child.returncode else ""
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if not how:
            return ""
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        for line in tail:
            tell(line)
        return "\n".join([f"{how}; the end of {log_path}:", *tail])


def _environment(argv: Sequence[str]) -> dict[str, Any]:
    return {
        "workload": "environment",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["octavo", "bench", "workloads", *argv],
        "machine": {**describe_machine(), "cpu_features": cpu_features()},
        "versions": {name: each for name, each in describe_versions().items() if each is not None},
        "commit": describe_source()["commit"],
    }


def summarise_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per row that a person wants to see at the end."""
    lines: list[str] = []
    for row in rows:
        label = f"{row['workload']:<10} {row.get('model', ''):<3} run {row.get('run', '-')}"
        if "error" in row:
            lines.append(f"{label}: FAILED: {row['error'].strip().splitlines()[-1]}")
        elif "skipped" in row:
            lines.append(f"{label}: skipped, {row['skipped']}")
        elif row["workload"] == "start":
            lines.append(f"{label}: {row['start_to_first_token_s']:.2f} s from process start to first token")
        elif "ms_per_token" in row:
            lines.append(f"{label}: {row['ms_per_token']:.3f} ms/token, first {row['first_ms']:.2f} ms{_ratio(row)}")
        elif "ms_per_step" in row:
            lines.append(f"{label}: {row['ms_per_step']:.3f} ms/step{_ratio(row)}")
        elif "seconds" in row:
            lines.append(f"{label}: {row['seconds']:.3f} s, {row['output_tok_s']:.0f} output tok/s{_ratio(row)}")
    return lines


def _ratio(row: dict[str, Any]) -> str:
    return f", {row['limit_ratio']:.2f} of the limit" if "limit_ratio" in row else ""

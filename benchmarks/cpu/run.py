"""Octavo beside its peers on the CPU workloads: alternated in one run, medians of the repeats, ratios, floor, memory.

Each engine is started anew in every round, in its own process and with its own Python, so that none warms the machine
for the next and the start is timed as often as the rest. Which engines exist on this machine is said by
``--peers FOLDER`` (see README.md here); an engine that fails is reported with the end of its log and left out.

    python benchmarks/cpu/run.py --peers /tmp/peers --repeats 3 --output benchmarks/cpu/results/2026-11-22
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from workloads import digest, make_workloads

HERE = Path(__file__).resolve().parent
NUM_PARAMETERS = 134_515_008
"""Of SmolLM2-135M; the tied embedding counts once."""
MIB = 1024 * 1024
START_LIMIT_S = 600.0
"""An engine that says nothing for so long is ended and reported."""


@dataclass(frozen=True)
class Engine:
    """How to start one engine in one setting."""

    name: str
    python: str
    starter: str
    options: dict[str, Any]
    packages: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])


def known_engines(peers: Path | None, model: str) -> list[Engine]:
    """Every engine that this machine has, Octavo first."""
    engines = [
        Engine("octavo-default", sys.executable, "octavo", {"model": model}, ("octavo", "torch")),
        Engine("octavo-float32", sys.executable, "octavo", {"model": model, "dtype": "float32"}, ("octavo", "torch")),
    ]  # fmt: skip
    if peers is None:
        return engines
    checkpoints = peers / "model"
    for dtype in ("float32", "bfloat16"):
        options = {"model": str(checkpoints / dtype), "dtype": dtype}
        python = str(peers / "transformers/bin/python")
        engines.append(Engine(f"transformers-{dtype}", python, "transformers", options, ("transformers", "torch")))
    vllm_environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    for dtype in ("float32", "bfloat16"):
        for mode, eager in (("eager", True), ("compiled", False)):
            options = {"model": str(checkpoints / dtype), "dtype": dtype, "enforce_eager": eager}
            python = str(peers / "vllm/bin/python")
            engines.append(
                Engine(f"vllm-{dtype}-{mode}", python, "vllm", options, ("vllm-cpu", "torch"), vllm_environment)
            )
    llama = {"q4_1": next(iter(sorted(checkpoints.glob("*.Q4_1.gguf"))), None)}
    llama |= {name: checkpoints / f"{name}.gguf" for name in ("q4_0", "bf16")}
    for name, path in llama.items():
        options = {"model": str(path), "binary": str(peers / "llama-server")}
        engines.append(Engine(f"llama.cpp-{name}", sys.executable, "llama_server", options, ()))
    return [engine for engine in engines if is_installed(engine)]


def is_installed(engine: Engine) -> bool:
    binary = engine.options.get("binary", engine.python)
    model = engine.options["model"]
    return Path(binary).exists() and (not os.path.isabs(model) or Path(model).exists())


# ----------------------------------------------------------------------------------------------------------- one engine


def run_engine(engine: Engine, names: list[str], log_path: Path) -> dict[str, Any]:
    """Start ``engine``, run the workloads, and read its memory before it ends.

    Raises:
        RuntimeError: It failed; the message has the end of its log.
    """
    read_fd, write_fd = os.pipe()
    command = [
        engine.python, str(HERE / "engines.py"), "--starter", engine.starter, "--options", json.dumps(engine.options),
        "--report-fd", str(write_fd), "--workloads", *names,
    ]  # fmt: skip
    result: dict[str, Any] = {"engine": engine.name, "load_average": os.getloadavg()[0], "workloads": {}}
    started_s = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[write_fd],
            env=os.environ | engine.environment,
        )  # fmt: skip
        os.close(write_fd)
        try:
            with os.fdopen(read_fd) as report:
                is_done = read_report(report, process, started_s, result)
        finally:
            end(process)
    if not is_done:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-8:])
        raise RuntimeError(f"{engine.name} ended with code {process.returncode}:\n{tail}")
    return result


def read_report(report: Any, process: subprocess.Popen[bytes], started_s: float, result: dict[str, Any]) -> bool:
    """Fill ``result`` from the engine's lines; False if they stop before the last."""
    for line in report:
        message = json.loads(line)
        if message.get("event") == "first_token":
            result["start_to_first_token_s"] = time.perf_counter() - started_s
        elif message.get("event") == "done":
            result["pss_bytes"] = proportional_memory(process.pid)
            return True
        else:
            result["workloads"][message.pop("workload")] = message
    return False


def proportional_memory(pid: int) -> int:
    """Proportional set size of a process and all its descendants, in bytes."""
    root = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])


def end(process: subprocess.Popen[bytes]) -> None:
    """End the engine and everything that it started."""
    try:
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        if descendant.is_running():
            descendant.kill()


# ---------------------------------------------------------------------------------------------------------- the figures


def figures(rounds: list[dict[str, Any]], best: bool = False) -> dict[str, float]:
    """Medians over the rounds of one engine, or the best: nearest to what a machine without other work would give."""
    workloads = make_workloads()
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    for one in rounds:
        add("start_to_first_token_s", one["start_to_first_token_s"])
        add("memory_mib", one["pss_bytes"] / MIB)
        for name, measured in one["workloads"].items():
            workload = workloads[name]
            if measured["first_token_s"] is not None:
                add(f"{name}_first_token_ms", measured["first_token_s"] * 1e3)
                steps = workload.num_output_tokens - 1
                add(f"{name}_ms_per_token", (measured["seconds"] - measured["first_token_s"]) / steps * 1e3)
            elif len(workload.prompts) == 1:
                add(f"{name}_prompt_tokens_per_s", workload.num_prompt_tokens / measured["seconds"])
            else:
                add(f"{name}_output_tokens_per_s", workload.num_output_tokens / measured["seconds"])
    if best:
        return {name: max(numbers) if name in BEST_IS_LARGE else min(numbers) for name, numbers in values.items()}
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def floors(machine: dict[str, Any]) -> dict[str, float]:
    """The best that reading the weights once per step, and multiplying, would allow on this machine."""
    workloads = make_workloads()
    flop_per_s = machine["flop_per_s"]["float32"]
    prefill = workloads["C3"].num_prompt_tokens * 2 * NUM_PARAMETERS / flop_per_s
    return {
        "C1_ms_per_token_float32": 4 * NUM_PARAMETERS / machine["read_bytes_per_s"] * 1e3,
        "C1_ms_per_token_bfloat16": 2 * NUM_PARAMETERS / machine["read_bytes_per_s"] * 1e3,
        "C1_ms_per_token_int8": NUM_PARAMETERS / machine["read_bytes_per_s"] * 1e3,
        "C3_prompt_tokens_per_s_float32": workloads["C3"].num_prompt_tokens / prefill,
    }


COLUMNS = {
    "C1_ms_per_token": "C1 ms/token",
    "C1_first_token_ms": "C1 first token, ms",
    "C2_output_tokens_per_s": "C2 output tok/s",
    "C3_prompt_tokens_per_s": "C3 prompt tok/s",
    "start_to_first_token_s": "start to first token, s",
    "memory_mib": "memory, MiB (PSS)",
}
BEST_IS_LARGE = {"C2_output_tokens_per_s", "C3_prompt_tokens_per_s"}


def to_markdown(result: dict[str, Any]) -> str:
    """The tables of medians and bests, and the floor."""
    machine = result["machine"]
    lines = [
        f"# CPU workloads, {result['date']}", "",
        f"{machine['cpu']}, {machine['cores']} cores; commit {result['commit']}; {result['repeats']} rounds.", "",
        "    " + result["command"], "",
    ]  # fmt: skip
    for title, rows in (("Medians", result["medians"]), ("Best round of each", result["bests"])):
        lines += [f"## {title}", "", *table(rows), ""]
    rates = [f"{dtype} {rate / 1e9:.1f} GFLOP/s" for dtype, rate in machine["flop_per_s"].items()]
    best = [f"{name} {number(value)}" for name, value in result["floors"].items()]
    lines += [
        f"Measured on this machine in the same run: {machine['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
        f"{', '.join(rates)}. Hence the floors: {', '.join(best)}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Figures of every engine, then how many times better each Octavo is than each peer (above 1: better)."""
    shown = [column for column in COLUMNS if any(column in row for row in rows.values())]
    head = [COLUMNS[column] for column in shown]
    lines = ["| engine | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(number(row.get(column)) for column in shown) + " |")
    ours = [name for name in rows if name.startswith("octavo")]
    for mine in ours:
        lines += ["", f"How many times better `{mine}` is (below 1: worse):", ""]
        lines += ["| than | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
        for name in rows:
            if name not in ours:
                ratios = [advantage(column, rows[mine], rows[name]) for column in shown]
                lines.append(f"| {name} | " + " | ".join(number(ratio) for ratio in ratios) + " |")
    return lines


def advantage(column: str, mine: dict[str, float], theirs: dict[str, float]) -> float | None:
    """How many times better ``mine`` is, None where one of them has no such figure."""
    if column not in mine or column not in theirs:
        return None
    return mine[column] / theirs[column] if column in BEST_IS_LARGE else theirs[column] / mine[column]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# -------------------------------------------------------------------------------------------------------------- the run


def main() -> int:
    args = parse_args()
    peers = args.peers.resolve() if args.peers else None
    known = {engine.name: engine for engine in known_engines(peers, args.model)}
    chosen = [name for name in known if any(name.startswith(wanted) for wanted in args.engines or known)]
    if not chosen:
        print(f"none of {args.engines} is installed; here are: {', '.join(known)}", file=sys.stderr)
        return 1
    output = args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    commit = describe_commit()
    floor = subprocess.run([sys.executable, str(HERE / "floor.py")], capture_output=True, text=True, check=True)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    failures: dict[str, str] = {}
    for repeat in range(args.repeats):
        for name in chosen:
            if name in failures:
                continue
            try:
                one = run_engine(known[name], args.workloads, output.with_suffix(f".{name}.log"))
            except RuntimeError as error:
                failures[name] = str(error)
                print(f"[{repeat + 1}/{args.repeats}] {error}", file=sys.stderr, flush=True)
                continue
            rounds[name].append(one)
            brief = {key: round(value, 2) for key, value in figures([one]).items()}
            print(f"[{repeat + 1}/{args.repeats}] {name}: {brief}", flush=True)
    result = summarise(args, known, rounds, failures, json.loads(floor.stdout))
    result["commit"] = commit if commit == describe_commit() else f"{commit} to {describe_commit()}"
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    markdown = to_markdown(result)
    output.with_suffix(".md").write_text(markdown)
    print(f"\n{markdown}")
    return 1 if failures else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", help="names or their beginnings; all installed ones if left out")
    parser.add_argument("--workloads", nargs="+", choices=sorted(make_workloads()), default=sorted(make_workloads()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m", help="what Octavo loads")
    parser.add_argument("--peers", type=Path, help="folder with the peers' environments and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="path of the result without suffix")
    return parser.parse_args()


def summarise(
    args: argparse.Namespace,
    known: dict[str, Engine],
    rounds: dict[str, list[dict[str, Any]]],
    failures: dict[str, str],
    floor: dict[str, Any],
) -> dict[str, Any]:
    machine = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(), **floor,
    }  # fmt: skip
    finished = {name: ran for name, ran in rounds.items() if ran}
    first = {name: {w: m["tokens"] for w, m in ran[0]["workloads"].items()} for name, ran in finished.items()}
    reference = first.get("transformers-float32")
    for ran in finished.values():
        for one in ran:
            for measured in one["workloads"].values():
                del measured["tokens"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": "",
        "machine": machine,
        "versions": {name: versions(known[name]) for name in finished},
        "workloads_sha256": digest(make_workloads()),
        "repeats": args.repeats,
        "medians": {name: figures(ran) for name, ran in finished.items()},
        "bests": {name: figures(ran, best=True) for name, ran in finished.items()},
        "floors": floors(machine),
        "same_tokens_as_transformers_float32": {
            name: {w: tokens == reference[w] for w, tokens in outputs.items()} for name, outputs in first.items()
        } if reference else None,
        "rounds": finished,
        "failures": failures,
    }  # fmt: skip


def versions(engine: Engine) -> dict[str, str]:
    if "binary" in engine.options:
        return {"llama-server": shell(engine.options["binary"], "--version").replace("\n", "; ")}
    code = f"from importlib.metadata import version\nfor p in {engine.packages!r}: print(p, version(p))"
    return dict(line.split() for line in shell(engine.python, "-c", code).splitlines())


def describe_commit() -> str:
    """What is measured. Looked up before and after: an editable installation may change meanwhile."""
    return shell("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12")


def shell(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())

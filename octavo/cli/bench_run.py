"""One engine process of ``octavo bench workloads``: starts a model, runs its workloads, writes a row after each.

Started by ``bench_workloads.py`` as ``python -m octavo.cli.bench_run TASK``, a process per model: start-up is measured
from the process's own start, and an engine that dies takes nothing else along. ``bench_profile.py`` is the other task.
"""

from __future__ import annotations

import faulthandler
import importlib
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from octavo.cli.bench_ceilings import measure_ceilings, memory_row, reset_memory_peak
from octavo.cli.bench_limits import ModelSize, limit_of_run
from octavo.cli.bench_lists import Workload, make_workload, model_config
from octavo.cli.bench_rows import ResultFile
from octavo.cli.main import installed_version
from octavo.config.args import EngineArgs
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from
from octavo.messages import EngineReady
from octavo.sampling_params import SamplingParams
from octavo.utils.logging import configure_logging

EXIT_FAILED = 3
"""A workload failed and its row says why; the rest may go on in a fresh process."""
LLM = "octavo.llm:LLM"
_ONE_REQUEST_REPEATS = 3
_SAFETY = 1.3
"""A run is begun when this multiple of what it should take is left."""


class Task(msgspec.Struct):
    """What a child process is to do; its only argument, as JSON."""

    model: str
    engine_argv: list[str]
    results: str
    scale: str
    runs: list[tuple[str, int]]
    """Workload and number of the run, in order; empty for a profile."""
    spawned_s: float
    """``time.monotonic()`` when the process was started."""
    deadline_s: float
    """``time.monotonic()`` after which nothing is begun."""
    run_limit_s: float = 120.0
    """A single run that takes longer ends the process, with all its stacks in the log."""
    start_number: int = 1


@dataclass
class Bench:
    """A running engine and what rows about it have in common."""

    llm: Any
    task: Task
    results: ResultFile
    device_type: str
    size: ModelSize

    @property
    def common(self) -> dict[str, Any]:
        """First keys of every row."""
        ready: EngineReady = self.llm.ready
        quantization = ready.config.device.quantization
        return {
            "engine": f"octavo {installed_version()}",
            "model": self.task.model,
            "quantization": None if quantization == "none" else quantization,
        }


def main(argv: Sequence[str]) -> int:
    """Run one Task; returns the exit status."""
    task = msgspec.json.decode(argv[0], type=Task)
    watch(task)
    results = ResultFile(Path(task.results))
    try:
        bench = start_engine(task, results)
    except BaseException:
        results.append({"model": task.model, "workload": "start", "error": traceback.format_exc()})
        raise
    measure_device(bench)
    for name, number in task.runs:
        row = {"workload": name, "run": number}
        watch(task)
        try:
            results.append({**bench.common, **row, **run_workload(bench, make_workload(name, task.scale))})
        except Exception:  # a row says so, and the parent starts a fresh process for the rest
            results.append({**row, "model": task.model, "error": traceback.format_exc()})
            return EXIT_FAILED
    bench.llm.close()
    faulthandler.cancel_dump_traceback_later()
    return 0


def watch(task: Task) -> None:
    """Log from here on, show all stacks on SIGUSR1, and leave with them when ``run_limit_s`` passes without a call."""
    configure_logging("info")
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)
    faulthandler.dump_traceback_later(task.run_limit_s, exit=True)


def engine_args_of(task: Task) -> EngineArgs:
    """The EngineArgs that the parent wrote as flags."""
    parser = FlagParser(prog="octavo bench workloads")
    add_engine_flags(parser)
    return engine_args_from(parser.parse(task.engine_argv))


def start_engine(task: Task, results: ResultFile) -> Bench:
    """Import, start, answer one short request; the row ``start`` says how long each took."""
    importlib.import_module("torch")
    module, _, name = LLM.partition(":")
    llm_class = getattr(importlib.import_module(module), name)
    args = engine_args_of(task)
    imported_s = time.monotonic()
    llm = llm_class.from_engine_args(args, in_process=True)
    started_s = time.monotonic()
    llm.generate([list(range(1, 17))], _params(0.0, 1), use_tqdm=False)
    first_token_s = time.monotonic()
    ready: EngineReady = llm.ready
    device = ready.config.device
    bench = Bench(llm, task, results, device.device_type, ModelSize.of(model_config(task.model, task.scale)))
    if device.device_type == "cpu":
        bench.size = ModelSize.of(model_config(task.model, task.scale), bytes_per_weight=4)
    limits = ready.config.scheduler
    results.append(
        {
            **bench.common, "workload": "start", "run": task.start_number, "import_s": imported_s - task.spawned_s,
            "engine_start_s": started_s - imported_s, "first_request_s": first_token_s - started_s,
            "start_to_first_token_s": first_token_s - task.spawned_s, "phases_s": ready.phase_seconds,
            "skip_tokenizer_init": ready.config.frontend.skip_tokenizer_init,
            "load_format": ready.config.load.load_format, "dtype": device.dtype,
            "max_model_len": limits.max_model_len, "gpu_memory_utilization": args.gpu_memory_utilization,
            "enable_prefix_caching": ready.config.cache.enable_prefix_caching, "seed": args.seed,
            "attention_backend": ready.attention_backend, "block_size": ready.config.cache.block_size,
            "max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_batched_tokens,
            "enforce_eager": args.enforce_eager, "asked_for": args.non_default(),
            "decisions": {each.field: f"{each.value}: {each.reason}" for each in ready.decisions},
            "weights_bytes": ready.weights_bytes, "activation_bytes": ready.activation_bytes,
            "available_kv_bytes": ready.available_kv_bytes, "num_kv_tokens": ready.num_kv_tokens,
            **memory_row(device.device_type),
        }
    )  # fmt: skip
    return bench


def measure_device(bench: Bench) -> None:
    """Write the row ``ceilings``, unless an earlier process of this run has."""
    if bench.results.ceilings() is not None:
        return
    try:
        bench.results.append(measure_ceilings(bench.device_type))
    except Exception:  # without ceilings there are no ratios; the times stand on their own
        bench.results.append({"workload": "ceilings", "error": traceback.format_exc()})


def run_workload(bench: Bench, workload: Workload) -> dict[str, Any]:
    """Run once (three times for one request) and say what it took; ``skipped`` says why when time is short."""
    remaining_s = bench.task.deadline_s - time.monotonic()
    expected_s = _expected_s(bench, workload)
    if expected_s * _SAFETY > remaining_s:
        return {"skipped": f"it takes about {expected_s:.1f} s, and {remaining_s:.1f} s are left"}
    reset_memory_peak(bench.device_type)
    common = {
        "requests": len(workload.prompts),
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": workload.num_output_tokens,
    }
    measure = _one_request if len(workload.prompts) == 1 else _many_requests
    return {**common, **measure(bench, workload), **memory_row(bench.device_type)}


def _one_request(bench: Bench, workload: Workload) -> dict[str, Any]:
    """Time to one token, and to all of them; the difference is the time per token."""
    count = workload.num_output_tokens
    _generate(bench, workload)  # makes what is made on first use
    firsts = [_generate(bench, workload, 1) for _ in range(_ONE_REQUEST_REPEATS)]
    wholes = [_generate(bench, workload) for _ in range(_ONE_REQUEST_REPEATS)]
    first_s, whole_s = statistics.median(firsts), statistics.median(wholes)
    row: dict[str, Any] = {
        "first_ms": 1e3 * first_s,
        "whole_s": whole_s,
        "ms_per_token": 1e3 * (whole_s - first_s) / (count - 1),
        "first_range_ms": [1e3 * min(firsts), 1e3 * max(firsts)],
        "whole_range_s": [min(wholes), max(wholes)],
    }
    ceilings = bench.results.ceilings()
    if ceilings is not None:
        lens = [len(prompt) for prompt in workload.prompts]
        limit_ms = 1e3 * limit_of_run(bench.size, lens, [count], ceilings, "decode").in_turn_s / (count - 1)
        first_limit_ms = 1e3 * limit_of_run(bench.size, lens, [1], ceilings, "prefill").in_turn_s
        row |= {"limit_ms_per_token": limit_ms, "limit_ratio": limit_ms / row["ms_per_token"]}
        row |= {"limit_first_ms": first_limit_ms, "first_limit_ratio": first_limit_ms / row["first_ms"]}
    return row


def _many_requests(bench: Bench, workload: Workload) -> dict[str, Any]:
    seconds = _generate(bench, workload)
    prompt_tokens, output_tokens = workload.num_prompt_tokens, workload.num_output_tokens
    row: dict[str, Any] = {
        "seconds": seconds,
        "output_tok_s": output_tokens / seconds,
        "total_tok_s": (prompt_tokens + output_tokens) / seconds,
        "prompt_tok_s": prompt_tokens / seconds,
    }
    ceilings = bench.results.ceilings()
    if ceilings is not None:
        lens = [len(prompt) for prompt in workload.prompts]
        limits = limit_of_run(bench.size, lens, workload.output_lens, ceilings)
        row |= {"limit_s": limits.in_turn_s, "limit_ratio": limits.in_turn_s / seconds}
        row |= {"limit_at_once_s": limits.at_once_s, "at_once_ratio": limits.at_once_s / seconds}
    return row


def _generate(bench: Bench, workload: Workload, output_len: int | None = None) -> float:
    """Seconds of one call with all requests.

    Raises:
        RuntimeError: An answer has not the length that was asked for.
    """
    lens = [output_len or length for length in workload.output_lens]
    params = [_params(workload.temperature, length) for length in lens]
    begin_s = time.perf_counter()
    outputs = bench.llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin_s
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if got != lens:
        wrong = next(index for index, (asked, length) in enumerate(zip(lens, got, strict=True)) if asked != length)
        raise RuntimeError(
            f"{workload.name}: request {wrong} has {got[wrong]} tokens instead of {lens[wrong]}, because "
            f"{outputs[wrong].outputs[0].finish_reason} {outputs[wrong].outputs[0].error or ''}"
        )
    return seconds


def _params(temperature: float, max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def _expected_s(bench: Bench, workload: Workload) -> float:
    """As long as the last time; before the first, its limit. Zero where nothing is known."""
    repeats = 2 * _ONE_REQUEST_REPEATS + 1 if len(workload.prompts) == 1 else 1
    for row in reversed(bench.results.read()):
        if row["workload"] == workload.name and ("seconds" in row or "whole_s" in row):
            return repeats * (row.get("seconds") or row["whole_s"])
    ceilings = bench.results.ceilings()
    if ceilings is None:
        return 0.0
    lens = [len(prompt) for prompt in workload.prompts]
    return repeats * limit_of_run(bench.size, lens, workload.output_lens, ceilings).in_turn_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Where the time of single steps goes: milliseconds per step, and tables of the kernels that a step launches.

The other engine process of ``octavo bench workloads`` (``--profile``): decode steps at several batch sizes, and prefill
steps. Each is timed without the profiler first; then torch's profiler writes a table to a text file.
"""

from __future__ import annotations

import faulthandler
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from octavo.cli.bench_ceilings import measure_ceilings, memory_row
from octavo.cli.bench_limits import ModelSize, limit_of_decode_step, limit_of_run
from octavo.cli.bench_lists import model_config
from octavo.cli.bench_rows import ResultFile
from octavo.cli.bench_run import Task, engine_args_of, watch
from octavo.cli.main import installed_version
from octavo.engine.frontend import Frontend, start_frontend
from octavo.errors import OctavoError
from octavo.sampling_params import SamplingParams

_CONTEXT = {"full": 512, "tiny": 16}
_BATCH_SIZES = {"full": (1, 8, 32, 128, 256), "tiny": (1, 4)}
_PROFILED_BATCHES = {"full": (1, 256), "tiny": (1, 4)}
_PREFILL_LEN = {"full": 4096, "tiny": 64}
_STEPS = 24
"""Decode steps timed; a third as many are profiled."""
_ROWS = 40


@dataclass
class Stepper:
    """An engine driven from here message by message, so that a profile holds the steps that it should."""

    frontend: Frontend
    vocab_size: int
    serial: int = 0

    def submit(self, count: int, prompt_len: int, max_tokens: int) -> list[str]:
        """Queue requests whose prompts differ from all before."""
        ids: list[str] = []
        params = SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        for _ in range(count):
            self.serial += 1
            prompt = [(self.serial * 7919 + position * 31) % self.vocab_size for position in range(prompt_len)]
            ids.append(f"profile-{self.serial}")
            self.frontend.submit(self.frontend.process(ids[-1], prompt, params))
        return ids

    def receive(self) -> int:
        """Wait for the engine's next message; returns how many tokens it brings."""
        received = self.frontend.client.recv(None)
        if received is None:
            return 0
        count = sum(len(output.new_token_ids) for output in received.outputs)
        _, refusals = self.frontend.take(received)
        if refusals:
            raise refusals[0].cause
        return count

    def receive_tokens(self, count: int) -> None:
        """Go on until so many tokens have come."""
        while count > 0:
            count -= self.receive()

    def end(self, ids: list[str]) -> None:
        """Abort requests and let the engine come to rest."""
        self.frontend.abort(ids)
        self.frontend.client.call("ping")
        while (received := self.frontend.client.recv(0.0)) is not None:
            self.frontend.take(received)


def main(argv: Sequence[str]) -> int:
    """Profile the model of one Task; returns the exit status."""
    task = msgspec.json.decode(argv[0], type=Task)
    watch(task)
    results = ResultFile(Path(task.results))
    frontend = start_frontend(engine_args_of(task), in_process=True)
    config = frontend.client.ready.config
    device_type = config.device.device_type
    size = ModelSize.of(model_config(task.model, task.scale), 2 if device_type == "cuda" else 4)
    if results.ceilings() is None:
        results.append(measure_ceilings(device_type))
    stepper = Stepper(frontend, config.model.vocab_size)
    common = {"engine": f"octavo {installed_version()}", "model": task.model}
    parts: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ({"workload": "prefill-step"}, lambda: _prefill(stepper, task, results, size, device_type))
    ]
    for batch in _BATCH_SIZES[task.scale]:
        if batch <= config.scheduler.max_num_seqs:
            parts.append(
                (
                    {"workload": "decode-step", "batch": batch, "context": _CONTEXT[task.scale]},
                    lambda batch=batch: _decode(stepper, task, results, size, device_type, batch),
                )
            )
    for head, part in parts:
        if time.monotonic() > task.deadline_s:
            results.append({**common, **head, "skipped": "time is up"})
            continue
        watch(task)
        try:
            results.append({**common, **head, **part(), **memory_row(device_type)})
        except Exception:  # a row says so; a broken engine ends the process with the next part
            results.append({**common, **head, "error": traceback.format_exc()})
            return 0
    frontend.client.close()
    faulthandler.cancel_dump_traceback_later()
    return 0


def _decode(
    stepper: Stepper, task: Task, results: ResultFile, size: ModelSize, device_type: str, batch: int
) -> dict[str, Any]:
    """Time steady decode steps of ``batch`` requests, then profile some."""
    context = _CONTEXT[task.scale]
    ids = stepper.submit(batch, context, 8 * _STEPS)
    # The first tokens come with prefill, and the first steps of a batch size may capture its graph.
    stepper.receive_tokens(batch * 6)
    begin_s = time.perf_counter()
    stepper.receive_tokens(batch * _STEPS)
    seconds = (time.perf_counter() - begin_s) / _STEPS
    row: dict[str, Any] = {"ms_per_step": 1e3 * seconds, "tok_s": batch / seconds}
    ceilings = results.ceilings()
    if ceilings is not None:
        limit_s = limit_of_decode_step(size, batch, context + _STEPS // 2 + 6, ceilings).in_turn_s
        row |= {"limit_ms_per_step": 1e3 * limit_s, "limit_ratio": limit_s / seconds}
    if batch in _PROFILED_BATCHES[task.scale]:
        path = Path(task.results).parent / f"profile-{task.model}-decode-{batch}.txt"
        steps = _STEPS // 3
        row |= _profiled(lambda: stepper.receive_tokens(batch * steps), path, device_type, steps)
    stepper.end(ids)
    return row


def _prefill(stepper: Stepper, task: Task, results: ResultFile, size: ModelSize, device_type: str) -> dict[str, Any]:
    """Time the prefill of one long prompt, then profile another."""
    length = min(_PREFILL_LEN[task.scale], stepper.frontend.client.ready.config.scheduler.max_model_len - 8)

    def one() -> None:
        stepper.submit(1, length, 1)
        stepper.receive_tokens(1)

    one()
    begin_s = time.perf_counter()
    one()
    seconds = time.perf_counter() - begin_s
    row: dict[str, Any] = {"prompt_tokens": length, "ms_per_step": 1e3 * seconds, "prompt_tok_s": length / seconds}
    ceilings = results.ceilings()
    if ceilings is not None:
        limit_s = limit_of_run(size, [length], [1], ceilings, "prefill").in_turn_s
        row |= {"limit_ms_per_step": 1e3 * limit_s, "limit_ratio": limit_s / seconds}
    path = Path(task.results).parent / f"profile-{task.model}-prefill.txt"
    return row | _profiled(one, path, device_type, 1)


def _profiled(work: Callable[[], None], path: Path, device_type: str, steps: int) -> dict[str, Any]:
    """Run under torch's profiler; the table of kernels goes to ``path``, its sums into the row."""
    torch: Any = importlib.import_module("torch")
    profiler: Any = importlib.import_module("torch.profiler")
    activities = [profiler.ProfilerActivity.CPU]
    if device_type == "cuda":
        activities.append(profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profiler.profile(activities=activities) as recorded:
        begin_s = time.perf_counter()
        work()
        if device_type == "cuda":
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - begin_s
    events = recorded.key_averages()
    key = "self_device_time_total" if device_type == "cuda" else "self_cpu_time_total"
    if device_type == "cuda":
        kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    else:
        kernels = list(events)
    kernels.sort(key=lambda event: getattr(event, key), reverse=True)
    busy_us = sum(getattr(event, key) for event in kernels)
    launches = sum(event.count for event in kernels)
    lines = [
        f"{steps} steps, profiled: {1e3 * wall_s / steps:.3f} ms wall, {busy_us / 1e3 / steps:.3f} ms in "
        f"{launches / steps:.0f} {'kernels' if device_type == 'cuda' else 'operators'} a step",
        f"{'us/step':>10} {'share':>6} {'calls':>7} {'us/call':>9}  name",
    ]
    for event in kernels[:_ROWS]:
        total = getattr(event, key)
        lines.append(
            f"{total / steps:10.1f} {total / max(busy_us, 1):6.1%} {event.count / steps:7.1f} "
            f"{total / max(event.count, 1):9.2f}  {event.key[:150]}"
        )
    lines += ["", "Host:", recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=_ROWS // 2)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "profile": path.name,
        "profiled_busy_ms_per_step": busy_us / 1e3 / steps,
        "kernels_per_step": launches / steps,
    }


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OctavoError as error:
        sys.exit(f"octavo bench workloads: error: {error.message}")

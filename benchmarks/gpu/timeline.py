"""Where a workload's wall time goes, step by step: device time of each step, device idle between steps, host time.

    python benchmarks/gpu/timeline.py W1 --output timeline-W1.csv [engine flags]

Runs one workload of ``octavo bench workloads`` in this process and watches the executor from outside. A line of the
CSV is a step: requests, tokens, requests with more than one token, milliseconds of the device (from the step's first
mark to its last), milliseconds that the device waited before it, milliseconds of the host to launch it, and of waiting
for its result. A table sums them by kind of step.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from octavo.cli.bench_lists import MAX_MODEL_LENS, MODEL_OF, Workload, make_workload, write_model
from octavo.config.args import EngineArgs
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams


@dataclass
class Step:
    """One step as seen from outside."""

    num_reqs: int
    num_tokens: int
    num_prompts: int
    pending: Any
    launch_ms: float
    device_ms: float = 0.0
    idle_ms: float = 0.0


class Watch:
    """Stands between the engine loop and its executor."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.steps: list[Step] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def forward(self, plan: Any, mask: bytes | None) -> Any:
        begin_s = time.perf_counter()
        future = self._executor.forward(plan, mask)
        launch_ms = 1e3 * (time.perf_counter() - begin_s)
        counts = plan.num_scheduled_tokens
        self.steps.append(
            Step(len(counts), sum(counts), sum(count > 1 for count in counts), future._pending, launch_ms)
        )
        return future

    def read_clocks(self) -> None:
        """After the run: device times from the marks."""
        last = None
        for step in self.steps:
            if step.pending is None:
                continue  # a CPU: its steps are over when they are launched
            times = step.pending._times
            step.device_ms = times[-1][1].elapsed_ms(times[0][0])
            if last is not None:
                step.idle_ms = max(0.0, times[0][0].elapsed_ms(last))
            last = times[-1][1]


def kind_of(step: Step) -> str:
    """For the table."""
    if not step.num_prompts:
        size = 1 << max(0, step.num_reqs - 1).bit_length()
        return f"decode <= {size:4d}"
    size = 1 << max(0, step.num_tokens - 1).bit_length()
    return f"mixed <= {size:5d} tokens"


def run(llm: LLM, workload: Workload) -> float:
    """Seconds of the whole workload."""
    params = [
        SamplingParams(temperature=workload.temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in workload.output_lens
    ]
    begin_s = time.perf_counter()
    llm.generate(workload.prompts, params, use_tqdm=False)
    return time.perf_counter() - begin_s


def report(steps: list[Step], seconds: float) -> str:
    """The table."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        groups[kind_of(step)].append(step)
    lines = [f"{'steps':>24} {'count':>6} {'device s':>9} {'idle s':>8} {'launch s':>9} {'ms/step':>8}"]
    for name, members in sorted(groups.items()):
        device, idle = sum(step.device_ms for step in members) / 1e3, sum(step.idle_ms for step in members) / 1e3
        launch = sum(step.launch_ms for step in members) / 1e3
        lines.append(
            f"{name:>24} {len(members):6d} {device:9.3f} {idle:8.3f} {launch:9.3f} {1e3 * device / len(members):8.3f}"
        )
    device, idle = sum(step.device_ms for step in steps) / 1e3, sum(step.idle_ms for step in steps) / 1e3
    lines.append(f"{'together':>24} {len(steps):6d} {device:9.3f} {idle:8.3f}; wall {seconds:.3f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(MODEL_OF))
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    name = MODEL_OF[options.workload]
    with TemporaryDirectory() as folder:
        path = write_model(Path(folder), name, options.scale)
        args = EngineArgs(
            model=str(path), skip_tokenizer_init=True, load_format="dummy", enable_prefix_caching=False,
            max_model_len=MAX_MODEL_LENS[name], gpu_memory_utilization=0.9,
            attention_backend=options.attention_backend,
        )  # fmt: skip
        llm = LLM.from_engine_args(args)
        core = llm._frontend.client._core
        for _ in range(options.repeats):
            watch = core._executor = Watch(core._executor)
            seconds = run(llm, make_workload(options.workload, options.scale))
            watch.read_clocks()
            print(options.workload, report(watch.steps, seconds), sep="\n", flush=True)
            core._executor = watch._executor
        if options.output is not None:
            with options.output.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["reqs", "tokens", "prompts", "device_ms", "idle_ms", "launch_ms"])
                for step in watch.steps:
                    times = (f"{each:.3f}" for each in (step.device_ms, step.idle_ms, step.launch_ms))
                    writer.writerow([step.num_reqs, step.num_tokens, step.num_prompts, *times])
        llm.close()


if __name__ == "__main__":
    main()

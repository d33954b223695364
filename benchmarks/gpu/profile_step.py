"""Where a step's time goes: decode steps one by one, eager and recorded, and prefill steps, with a table of kernels.

    python benchmarks/gpu/profile_step.py OUT [--model FOLDER] [--batches 1,16,64,256] [--context 512] [--prefill 2048]

Drives a Worker with plans made by hand: no scheduler, no frontend, dummy weights. Without ``--model`` it takes the
shape of Qwen3-0.6B. Writes ``steps.jsonl`` (times), ``kernels-*.txt`` (torch profiler), ``*.timeline`` and
``*.shares`` (what each kernel adds to a step) to OUT, and tells what it does.
Runs on a CPU as well (``--device cpu``), which is how the script itself is tested.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
import traceback
from pathlib import Path
from statistics import median

import torch

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.config.args import EngineArgs
from octavo.config.kv_cache_size import size_kv_cache
from octavo.config.resolve import resolve
from octavo.device.registry import find_device_type, probe_hardware
from octavo.messages import NewRow, ResolvedSampling, SchedulerOutput
from octavo.worker.worker import Worker

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip


class Steps:
    """A worker and the requests in it."""

    def __init__(self, model: str, options: argparse.Namespace, *, eager: bool) -> None:
        args = EngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            device=options.device,
            dtype=options.dtype,
            max_model_len=options.context + 1024,
            max_num_seqs=max(options.batches),
            max_num_batched_tokens=max(options.prefill, max(options.batches)),
            enforce_eager=eager,
            attention_backend=options.attention_backend,
            kv_cache_memory_bytes=options.kv_gib * 2**30 if options.kv_gib else None,
        )
        began = time.monotonic()
        located = locate_model(args.model, args.revision, args.download_dir)
        config, _ = resolve(
            args, located, read_model_config(located, args.hf_overrides), probe_hardware(options.device)
        )
        self.worker = Worker(config)
        marks = [("probe", time.monotonic() - began)]
        report = self.worker.load()
        marks.append(("load", time.monotonic() - began))
        size = size_kv_cache(args, config, report)
        self.worker.allocate(size.num_blocks)
        marks.append(("allocate", time.monotonic() - began))
        self.worker.warm_up()
        self.synchronize()
        marks.append(("warm-up", time.monotonic() - began))
        print(f"started ({'eager' if eager else 'graphs'}):", ", ".join(f"{n} {s:.2f}" for n, s in marks), flush=True)
        self.block_size, self.num_groups = report.kv_spec.block_size, len(report.kv_spec.groups)
        self.num_blocks = size.num_blocks
        self.step_id = 0
        self.lengths: list[int] = []
        self._removed: list[int] = []
        self._next_block = 1

    def synchronize(self) -> None:
        self.worker._device.synchronize()

    def start(self, count: int, context: int, temperature: float) -> SchedulerOutput:
        """Replace all requests by ``count`` new ones whose first ``context - 1`` tokens count as computed."""
        self._next_block = 1
        per_row = -(-(context + 512) // self.block_size)
        assert count * per_row * self.num_groups < self.num_blocks, "the cache is too small for this batch"
        new: list[NewRow] = []
        for row in range(count):
            blocks: list[list[int]] = []
            for _ in range(self.num_groups):
                blocks.append(list(range(self._next_block, self._next_block + per_row)))
                self._next_block += per_row
            sampling = ResolvedSampling(max_tokens=10**6, seed=row, temperature=temperature)
            tokens = [(17 * row + i) % 1000 for i in range(context)]
            new.append(NewRow(row, tokens, context, context - 1, sampling, blocks))
        plan = SchedulerOutput(self.step_id, self._removed, new, list(range(count)), [1] * count)
        self._removed = list(range(count))
        self.step_id += 1
        return plan

    def decode(self, count: int) -> SchedulerOutput:
        self.step_id += 1
        return SchedulerOutput(self.step_id, [], [], list(range(count)), [1] * count)

    def prefill(self, num_tokens: int) -> SchedulerOutput:
        """One request whose whole prompt runs."""
        plan = self.start(1, num_tokens, 0.0)
        row = plan.new_rows[0]
        fresh = NewRow(row.row, row.token_ids, num_tokens, 0, row.sampling, row.block_ids)
        return SchedulerOutput(plan.step_id, plan.removed_rows, [fresh], [0], [num_tokens])


def time_decode(steps: Steps, count: int, context: int, temperature: float, repeats: int) -> dict[str, float]:
    """Milliseconds: of the wall with two steps in flight, of launching alone on the host, of the device."""
    worker = steps.worker
    worker.forward(steps.start(count, context, temperature), None).result()
    for _ in range(5):
        worker.forward(steps.decode(count), None).result()
    began = time.perf_counter()
    before = worker.forward(steps.decode(count), None)
    launch_ms: list[float] = []
    device_ms: list[float] = []
    for _ in range(repeats):
        plan = steps.decode(count)
        launch_began = time.perf_counter()
        future = worker.forward(plan, None)
        launch_ms.append((time.perf_counter() - launch_began) * 1e3)
        device_ms.append(before.result().forward_ms)
        before = future
    before.result()
    wall_ms = (time.perf_counter() - began) * 1e3 / (repeats + 1)
    return {"wall_ms": wall_ms, "launch_ms": median(launch_ms), "device_ms": median(device_ms)}


def time_prefill(steps: Steps, num_tokens: int, repeats: int) -> dict[str, float]:
    steps.worker.forward(steps.prefill(num_tokens), None).result()
    walls, launches, device = [], [], []
    for _ in range(repeats):
        plan = steps.prefill(num_tokens)
        steps.synchronize()
        began = time.perf_counter()
        future = steps.worker.forward(plan, None)
        launches.append((time.perf_counter() - began) * 1e3)
        device.append(future.result().forward_ms)
        walls.append((time.perf_counter() - began) * 1e3)
    return {"wall_ms": median(walls), "launch_ms": median(launches), "device_ms": median(device)}


def profile(path: Path, run, device: str) -> None:
    """Table of kernels of a few steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities) as recorded:
        run()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    path.write_text(averages.table(sort_by=key, row_limit=60, max_name_column_width=90))
    if device == "cuda":
        found = [
            {"name": e.name, "start_us": e.time_range.start, "end_us": e.time_range.end}
            for e in recorded.events()
            if str(e.device_type).endswith("CUDA")
        ]
        found.sort(key=lambda e: e["end_us"])
        lines = "\n".join(
            f"{e['start_us'] - found[0]['start_us']:12.1f} {e['end_us'] - e['start_us']:9.1f} {e['name'][:110]}"
            for e in found
        )
        path.with_suffix(".timeline").write_text(lines)
        path.with_suffix(".shares").write_text(shares(found))
    print(f"wrote {path}", flush=True)


def shares(kernels: list[dict]) -> str:
    """What each kernel adds to the chain: from the end of the one before it to its own.

    Durations do not say that: kernels that are launched early wait inside."""
    added: dict[str, list[float]] = {}
    for before, kernel in itertools.pairwise(kernels):
        added.setdefault(kernel["name"][:70], []).append(kernel["end_us"] - before["end_us"])
    rows = sorted(added.items(), key=lambda row: -sum(row[1]))
    return "\n".join(
        f"{sum(each):10.1f} us added by {len(each):5d} launches, median {median(each):8.2f}: {name}"
        for name, each in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--kv-gib", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--eager-repeats", type=int, default=10)
    options = parser.parse_args()
    options.device = options.device or find_device_type()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.model
    if model is None:
        folder = options.out / "qwen3-0.6b"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3_06B))
        model = str(folder)
    name = Path(model).name
    with (options.out / "steps.jsonl").open("a") as log:

        def note(**row) -> None:
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()

        for eager in (False, True):
            mode = "eager" if eager else "graph"
            steps = Steps(model, options, eager=eager)
            repeats = options.eager_repeats if eager else options.repeats
            for count in options.batches:
                for temperature in (0.0, 0.6):
                    try:
                        times = time_decode(steps, count, options.context, temperature, repeats)
                        note(
                            model=name,
                            mode=mode,
                            batch=count,
                            context=options.context,
                            temperature=temperature,
                            **times,
                        )
                    except Exception:  # one shape's trouble must not cost the other figures
                        traceback.print_exc()
                if count in (options.batches[0], options.batches[-1]):
                    steps.worker.forward(steps.start(count, options.context, 0.6), None).result()

                    def decode(count: int = count, steps: Steps = steps) -> None:
                        for _ in range(3):
                            steps.worker.forward(steps.decode(count), None).result()
                        steps.synchronize()

                    decode()
                    profile(options.out / f"kernels-{name}-{mode}-decode-{count}.txt", decode, options.device)
            for num_tokens in sorted({64, 512, options.prefill}):
                if num_tokens > options.prefill or num_tokens > options.context + 512:
                    continue
                note(model=name, mode=mode, prefill=num_tokens, **time_prefill(steps, num_tokens, max(3, repeats // 5)))
            if eager:

                def prefill(steps: Steps = steps) -> None:
                    tokens = min(options.prefill, options.context)
                    steps.worker.forward(steps.prefill(tokens), None).result()
                    steps.synchronize()

                profile(options.out / f"kernels-{name}-prefill.txt", prefill, options.device)
            del steps
            if options.device == "cuda":
                import gc

                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

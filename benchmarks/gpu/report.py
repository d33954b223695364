"""Results of ``octavo bench workloads`` beside vLLM 0.25.1 on the same card, as a Markdown table.

    python benchmarks/gpu/report.py RESULTS.jsonl

vLLM's figures were measured on an NVIDIA H200 on 2026-11-22 (torch 2.11, FlashAttention 3, CUDA graphs, dummy weights,
prefix caching off): the same lists, shapes and definitions. On any other device only the limits say something.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PEER = {
    "W1": (5.87, 4.3), "W2": (45.1, 40.5), "W3": (4.96, 4.0), "W4": (2.16, 0.60), "W5": (13.9, 13.3), "W6": (11.2, 9.5),
    "W6-prefill": (3.05, None),
}  # fmt: skip
"""vLLM's best and our aim: seconds, for W3 and W4 milliseconds a token."""
PER_TOKEN = ("W3", "W4")


def main(path: str) -> None:
    """Print the table."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    environment = next((row for row in rows if row["workload"] == "environment"), {})
    ceilings = next((row for row in rows if row["workload"] == "ceilings" and "error" not in row), None)
    print(f"Commit {environment.get('commit')}, {environment.get('date')}, torch "
          f"{environment.get('versions', {}).get('torch')}.")  # fmt: skip
    if ceilings is not None:
        print(f"{ceilings['device']}: {ceilings['copy_TBps']:.2f} TB/s copied, {ceilings['bf16_TFLOPs']:.0f} TFLOP/s, "
              f"{ceilings['bf16_sustained_TFLOPs']:.0f} sustained.")  # fmt: skip
    print("\n| workload | runs | median | limit | share of limit | vLLM 0.25.1 | vLLM / Octavo | aim | missed by |")
    print("|---|---|---|---|---|---|---|---|---|")
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["workload"] in PEER and ("seconds" in row or "ms_per_token" in row):
            runs[row["workload"]].append(row)
    for name, (peer, aim) in PEER.items():
        print(_line(name, runs[name], peer, aim))
    for row in rows:
        if row["workload"] == "start" and "error" not in row:
            print(f"\nStart {row['model']}: {row['start_to_first_token_s']:.2f} s from process start to first token.")
        if "error" in row:
            print(f"\n{row['workload']} FAILED: {row['error'].strip().splitlines()[-1]}")


def _line(name: str, runs: list[dict[str, Any]], peer: float, aim: float | None) -> str:
    unit, key, limit_key = (
        ("ms/token", "ms_per_token", "limit_ms_per_token") if name in PER_TOKEN else ("s", "seconds", "limit_s")
    )
    shown_aim = "" if aim is None else f"{aim:g}"
    if not runs:
        return f"| {name}, {unit} | not run | | | | {peer} | | {shown_aim} | |"
    values = [row[key] for row in runs]
    median = statistics.median(values)
    limit = runs[0].get(limit_key)
    shown = "" if limit is None else f"{limit:.3g} | {limit / median:.2f}"
    missed = "" if aim is None else "met" if median <= aim else f"{median / aim - 1:.0%}"
    each = ", ".join(f"{value:.3f}" for value in values)
    return (
        f"| {name}, {unit} | {each} | {median:.3f} | {shown or '|'} | {peer} | {peer / median:.2f} | {shown_aim} | "
        f"{missed} |"
    )


if __name__ == "__main__":
    main(sys.argv[1])

"""The fixed workloads: the lists never move, limits agree with the published ones, and a run survives its engine.

Red when a draw of a workload moves (results would no longer compare), when the roofline counts wrongly, or when a
failing or dying engine process loses the runs after it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.cli import bench_workloads
from octavo.cli.bench_limits import Ceilings, ModelSize, limit_of_decode_step, limit_of_run
from octavo.cli.bench_lists import MAX_MODEL_LENS, MODEL_OF, WORKLOADS, make_workload, model_config, write_model
from octavo.cli.bench_rows import ResultFile
from octavo.cli.bench_workloads import main, summarise_rows, workload_names
from octavo.errors import ConfigError

DIGESTS = {
    "W1": "48bae5a1088c03e5", "W2": "4e4fb6256386909a", "W3": "77737f430fb1a404", "W4": "441f58d9de66bd63",
    "W5": "bc90179ed9b8b901", "W6": "576ed505b697494a", "W6-prefill": "06070e4b8bc07014",
    "W9": "b3733cc575f287e9", "W10": "e88f721119288c33", "W11": "17323c0aeb2e4cbb", "W12": "3f6ee1262e309df0",
}  # fmt: skip
"""Of the lists that the peers' published runs used: model, prompts, lengths, temperature."""
H200 = Ceilings(4.299e12, 771.2e12, 669.75e12)


@pytest.mark.parametrize("name", DIGESTS)
def test_the_lists_are_those_of_every_published_result(name: str) -> None:
    made = make_workload(name)
    text = json.dumps((made.model, made.prompts, made.output_lens, made.temperature))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


def test_every_workload_is_known_and_fits_its_engine() -> None:
    assert set(WORKLOADS) == set(DIGESTS) == set(MODEL_OF)
    for name in WORKLOADS:
        assert make_workload(name).model == MODEL_OF[name]
        assert make_workload(name).max_len <= MAX_MODEL_LENS[MODEL_OF[name]]
        assert make_workload(name, "tiny").max_len < 1024
        assert len(make_workload(name, "tiny").prompts) <= 6


@pytest.mark.parametrize(
    ("name", "seconds"), [("W1", 3.75), ("W2", 36.8), ("W5", 12.6), ("W6", 8.75), ("W6-prefill", 2.76)]
)
def test_limits_on_an_h200_are_the_published_ones(name: str, seconds: float) -> None:
    made = make_workload(name)
    size = ModelSize.of(model_config(made.model))
    limits = limit_of_run(size, [len(prompt) for prompt in made.prompts], made.output_lens, H200)
    assert limits.in_turn_s == pytest.approx(seconds, rel=0.003)
    assert limits.at_once_s < limits.in_turn_s


def test_one_token_of_the_big_model_is_its_weights_over_the_bandwidth() -> None:
    size = ModelSize.of(model_config("m2"))
    assert size.linear + 2 * size.head == pytest.approx(8.03e9, rel=1e-3)
    assert limit_of_decode_step(size, 1, 256, H200).in_turn_s == pytest.approx(3.50e-3, rel=0.005)
    # 256 requests read the weights once and 512 tokens of cache each.
    assert limit_of_decode_step(size, 256, 768, H200).in_turn_s == pytest.approx(11.7e-3, rel=0.03)


def test_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    size = ModelSize.of(model_config("m3"))
    total = size.linear + 2 * size.head + size.expert * size.num_experts
    assert total == pytest.approx(30.53e9, rel=1e-3)
    active = size.linear + 2 * size.head + size.expert * size.top_k
    assert active == pytest.approx(3.35e9, rel=1e-2)
    assert size.experts_read(1) == pytest.approx(8)
    assert size.experts_read(256) == pytest.approx(128, rel=1e-4)
    one = (size.linear + size.head + 8 * size.expert) * 2 + 256 * size.kv_bytes_per_token
    assert limit_of_decode_step(size, 1, 256, H200).in_turn_s == pytest.approx(one / 4.299e12, rel=1e-3)


def test_local_layers_read_their_window() -> None:
    size = ModelSize.of(model_config("m4"))
    assert size.linear + size.head == pytest.approx(11.77e9, rel=2e-3)
    assert (size.num_local_layers, size.num_layers, size.window) == (40, 48, 1024)
    assert size.seen([2048]) == pytest.approx((40 * 1024 + 8 * 2048) / 48)
    # A prompt of three tokens of which local layers see two: 6 pairs in global layers, 5 in local ones.
    small = replace(size, window=2)
    assert small.pairs(3) == pytest.approx((40 * 5 + 8 * 6) / 48)
    assert size.pairs(100) == 5050


def test_model_folders_hold_a_shape_and_nothing_else(tmp_path: Path) -> None:
    path = write_model(tmp_path, "m1", "tiny")
    assert sorted(each.name for each in path.iterdir()) == ["config.json", "generation_config.json"]
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_names_are_checked_and_put_in_the_order_of_value() -> None:
    assert workload_names("W2,W4, W3") == ["W4", "W3", "W2"]
    assert "W9" not in workload_names("all")
    assert workload_names("W10,W9") == ["W9", "W10"]
    with pytest.raises(ConfigError, match=r"no 'W111'.*W1"):
        workload_names("W111")
    with pytest.raises(ConfigError, match="its own"):
        main(["--output-dir", "/nonexistent/never-made", "some-model"])


CHILD = """
import json, os, sys, time
task = json.loads(sys.argv[1])
def row(**values):
    open(task["results"], "a").write(json.dumps({"model": task["model"], **values}) + "\\n")
row(workload="start", run=task["start_number"], start_to_first_token_s=1.0, argv=task["engine_argv"])
for name, number in task["runs"]:
    if name == "W3":
        print("the device is gone", file=sys.stderr, flush=True)
        os._exit(9)
    if name == "W6":
        row(workload=name, run=number, error="Traceback\\nRuntimeError: no")
        sys.exit(3)
    row(workload=name, run=number, seconds=2.0, output_tok_s=5.0, limit_ratio=0.5)
"""


@pytest.fixture
def fake_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Engine processes that follow CHILD."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def start(command: list[str], **options: Any) -> Any:
        return subprocess.Popen([sys.executable, str(script), command[-1]], **options)

    monkeypatch.setattr(bench_workloads, "Popen", start)
    return tmp_path / "out"


def test_a_dying_and_a_failing_engine_lose_no_other_run(
    fake_children: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--output-dir", str(fake_children), "--repeats", "2", "--workloads", "W4,W3,W6,W2", "--block-size", "32"]
    assert main(argv) == 1
    rows = ResultFile(fake_children / "results.jsonl").read()
    done = [(row["workload"], row["run"]) for row in rows if "seconds" in row]
    assert done == [("W4", 1), ("W4", 2), ("W2", 1), ("W2", 2)]
    errors = {row["workload"]: row["error"] for row in rows if "error" in row}
    assert "status 9" in errors["W3"]
    assert "the device is gone" in errors["W3"]
    assert "RuntimeError: no" in errors["W6"]
    starts = [row for row in rows if row["workload"] == "start"]
    assert [row["model"] for row in starts] == ["m1", "m2", "m2", "m2"]
    for row in starts:
        assert {"--load-format=dummy", "--block-size=32", "--no-enable-prefix-caching"} <= set(row["argv"])
    assert "W3         m2  run 1: FAILED" in capsys.readouterr().err


def test_the_environment_counts_here_too(fake_children: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")
    assert main(["--output-dir", str(fake_children), "--repeats", "1", "--workloads", "W4"]) == 0
    rows = ResultFile(fake_children / "results.jsonl").read()
    (start,) = [row for row in rows if row["workload"] == "start"]
    assert "--attention-backend=TORCH_SDPA" in start["argv"]
    assert rows[0]["versions"]["torch"]


def test_nothing_is_begun_after_the_time_limit(fake_children: Path) -> None:
    assert main(["--output-dir", str(fake_children), "--time-limit", "1", "--workloads", "W4"]) == 0
    rows = ResultFile(fake_children / "results.jsonl").read()
    assert [row["skipped"] for row in rows if row["workload"] == "W4"] == ["time is up"] * 3


def test_results_are_never_mixed(fake_children: Path) -> None:
    assert main(["--output-dir", str(fake_children), "--workloads", "W4", "--repeats", "1"]) == 0
    with pytest.raises(ConfigError, match="holds results already"):
        main(["--output-dir", str(fake_children), "--workloads", "W4"])


def test_a_cut_line_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"workload": "ceilings", "error": "x"}\n{"workload": "W1", "sec')
    assert ResultFile(path).read() == [{"workload": "ceilings", "error": "x"}]
    assert ResultFile(path).ceilings() is None


def test_the_summary_says_speed_and_share_of_the_limit() -> None:
    rows = [
        {"workload": "W3", "model": "m2", "run": 1, "ms_per_token": 4.0, "first_ms": 6.0, "limit_ratio": 0.875},
        {"workload": "W1", "model": "m1", "run": 2, "seconds": 4.0, "output_tok_s": 31000.0, "limit_ratio": 0.9},
    ]
    assert summarise_rows(rows) == [
        "W3         m2  run 1: 4.000 ms/token, first 6.00 ms, 0.88 of the limit",
        "W1         m1  run 2: 4.000 s, 31000 output tok/s, 0.90 of the limit",
    ]


def test_the_whole_machinery_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real engine, in this process instead of children: red when engine, settings and rows do not fit."""

    def call(command: list[str], **_: Any) -> Any:
        status = importlib.import_module(command[2]).main(command[3:])
        return SimpleNamespace(wait=lambda _: status, poll=lambda: status, returncode=status)

    monkeypatch.setattr(bench_workloads, "Popen", call)
    out = tmp_path / "out"
    argv = ["--scale", "tiny", "--workloads", "W4", "--repeats", "1", "--profile", "--output-dir", str(out)]
    assert main([*argv, "--num-threads", "1"]) == 0
    rows = {row["workload"]: row for row in ResultFile(out / "results.jsonl").read()}
    assert set(rows) == {"environment", "start", "ceilings", "W4", "prefill-step", "decode-step"}
    assert rows["start"]["start_to_first_token_s"] > rows["start"]["engine_start_s"] > 0
    assert rows["W4"]["ms_per_token"] > 0
    assert rows["W4"]["limit_ratio"] > 0
    table = (out / "profile-m1-decode-1.txt").read_text()
    assert "aten::mm" in table

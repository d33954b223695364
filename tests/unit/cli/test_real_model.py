"""The installed command with the real model, as a person would run it. Red when any part between breaks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "octavo.cli.main"]


@pytest.mark.slow
def test_a_chat_through_a_pipe_reuses_the_prefix(smollm2_gguf: Path, tmp_path: Path) -> None:
    size = ["--max-tokens", "12", "--max-model-len", "256"]
    done = subprocess.run(
        [*COMMAND, "chat", str(smollm2_gguf), "--temperature", "0", *size],
        input="What is 2+2?\nAnd 3+3?\n" + "word " * 300,
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "4" in done.stdout
    assert len(done.stdout.splitlines()) >= 2
    turns = [line for line in done.stderr.splitlines() if "cached)" in line]
    assert "37 prompt tokens (0 cached)" in turns[0]
    # 37 + 12 tokens were computed by the first turn: three full blocks.
    assert "(48 cached)" in turns[1]
    assert len(turns) == 2
    assert "error: the message is too long" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_answer(smollm2_gguf: Path) -> None:
    argv = ["--prompt", "Tell me a story", "--ignore-eos", "--max-tokens", "4000"]
    process = subprocess.Popen(
        [*COMMAND, "generate", str(smollm2_gguf), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    begun = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate()
    assert process.returncode == 130
    assert len(begun) == 10
    assert rest.endswith("\n")
    assert "interrupted" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_bench_measures_what_it_was_asked_for(smollm2_gguf: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    size = ["--num-prompts", "3", "--input-len", "20", "--output-len", "4", "--max-model-len", "64"]
    argv = [*COMMAND, "bench", "throughput", str(smollm2_gguf), *size, "--output-json", str(report), "-q"]
    assert subprocess.run(argv, check=False).returncode == 0
    assert json.loads(report.read_text())["total_num_tokens"] == 72

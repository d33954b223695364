"""octavo run-batch: rows in, rows out, bad ones alone; a kill in the middle loses nothing and repeats nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.batch_file import BadRowError, BatchFile
from octavo.cli.batch_journal import Journal
from octavo.cli.run_batch import main
from octavo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


class FakeApp:
    """Answers with the prompt in capitals. ``teapot`` gets a 418, ``dead`` says that the engine is gone."""

    max_concurrency = 4

    def __init__(self, args: Any = None, *, log: Path | None = None, delay_s: float = 0.0) -> None:
        self.args = args
        self.log = log
        self.delay_s = delay_s
        self.asked: list[str] = []
        self.num_open = self.most_open = 0
        self.is_closed = False

    async def app(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        message = await receive()
        body = json.loads(message["body"])
        prompt = body["prompt"]
        self.asked.append(prompt)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(self.delay_s)
        self.num_open -= 1
        status, answer = 200, {"choices": [{"text": prompt.upper()}], "usage": {"total_tokens": 7}}
        if prompt == "teapot":
            status, answer = 418, {"error": {"message": "short and stout", "code": "invalid_value"}}
        elif prompt == "dead":
            status, answer = 500, {"error": {"message": "the engine has ended", "code": "engine_error"}}
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(prompt + "\n")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def close(self) -> None:
        self.is_closed = True


def row(custom_id: Any, prompt: str = "hi", **more: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **more}


def write(path: Path, *rows: Any) -> str:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_answers_come_in_the_order_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", *(row(f"r{index}", f"say {index}") for index in range(50)), "")
    out, app = str(tmp_path / "out.jsonl"), FakeApp(delay_s=0.001)
    assert main(["-i", source, "-o", out, "--max-num-seqs", "3"], lambda args: app) == 0
    rows = read(out)
    assert [each["custom_id"] for each in rows] == [f"r{index}" for index in range(50)]
    assert [each["response"]["body"]["choices"][0]["text"] for each in rows] == [f"SAY {index}" for index in range(50)]
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in rows)
    assert len({each["id"] for each in rows}) == 50
    assert app.most_open == 4 and app.is_closed
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    assert "50 rows written" in capsys.readouterr().err


def test_a_bad_row_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "in.jsonl", row("good"), "{broken", "[1]", row(None), row("good"), row("get", method="GET"),
        row("url", url="/v1/nowhere"), row("body", body="x"), row("stream", body={"prompt": "x", "stream": True}),
        row("refused", "teapot"), '{"custom_id": "\\ud800", "url": 5}', row("last"),
    )  # fmt: skip
    out, app = str(tmp_path / "out.jsonl"), FakeApp()
    assert main(["-i", source, "-o", out], lambda args: app) == 0
    rows = read(out)
    codes = [each["error"]["code"] if each["error"] else each["response"]["status_code"] for each in rows]
    assert codes == [
        200, "invalid_json_line", "invalid_json_line", "missing_required_parameter", "duplicate_custom_id",
        "invalid_method", "invalid_url", "missing_required_parameter", "invalid_value", 418, "invalid_url", 200,
    ]  # fmt: skip
    assert rows[9]["response"]["body"]["error"]["message"] == "short and stout"
    assert [each["custom_id"] for each in rows][-4:-2] == ["stream", "refused"]
    assert "10 of them errors" in capsys.readouterr().err


def test_rows_that_begin_alike_follow_each_other(tmp_path: Path) -> None:
    long = ["All cats are grey. " * 20, "In the beginning was the word. " * 20]
    prompts = [long[index % 2] + f"question {index}" for index in range(20)]
    source = write(tmp_path / "in.jsonl", *(row(f"r{index}", prompt) for index, prompt in enumerate(prompts)))
    file = BatchFile(source)
    beginnings = [file.read(place).body["prompt"][:6] for place in file.in_order_of_prefix()]
    assert beginnings == ["All ca"] * 10 + ["In the"] * 10
    lines = [place.line for place in file.in_order_of_prefix()]
    assert sorted(lines) == list(range(20))


def test_the_end_of_the_engine_stops_the_batch_and_blames_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a", "b", "dead", "c", "d", "e", "f"]
    source = write(tmp_path / "in.jsonl", *(row(f"r{index}", prompt) for index, prompt in enumerate(prompts)))
    out, app = str(tmp_path / "out.jsonl"), FakeApp()
    assert main(["-i", source, "-o", out, "--max-concurrency", "1"], lambda args: app) == 1
    assert "the engine has ended" in capsys.readouterr().err
    assert not Path(out).exists() and len(read(out + ".journal")) == 1 + len(app.asked) - 1
    again = FakeApp()
    again.app = _immortal(again)  # type: ignore[method-assign]
    assert main(["-i", source, "-o", out, "--max-concurrency", "1"], lambda args: again) == 0
    assert sorted(app.asked + again.asked) == sorted([*prompts, "dead"])
    assert len(read(out)) == len(prompts)


def _immortal(fake: FakeApp) -> Any:
    inner = FakeApp.app

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def revive(message: Any) -> None:
            await send({**message, "status": 200} if message["type"] == "http.response.start" else message)

        await inner(fake, scope, receive, revive)

    return app


CHILD = """
import sys
from pathlib import Path
from octavo.cli.run_batch import main
from tests.unit.cli.test_run_batch import FakeApp
source, out, log = sys.argv[1:]
sys.exit(main(["-q", "-i", source, "-o", out], lambda args: FakeApp(log=Path(log), delay_s=0.02)))
"""


def test_a_kill_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """Red when a finished row is only in memory, when a cut line spoils the journal, or when resuming starts over."""
    count = 200
    source = write(tmp_path / "in.jsonl", *(row(f"r{index}", f"p{index}") for index in range(count)))
    out, log = str(tmp_path / "out.jsonl"), tmp_path / "log"
    command = [sys.executable, "-c", CHILD, source, out, str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for at_least in (20, 60):
        child = subprocess.Popen(command, env=environment, cwd=ROOT)
        while not log.exists() or len(log.read_text().split()) < at_least:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    # As if the kill had hit the middle of a write.
    with open(out + ".journal", "ab") as journal:
        journal.write(b'{"line": 199, "row": {"id": "half')
    assert subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0
    rows = read(out)
    assert [each["custom_id"] for each in rows] == [f"r{index}" for index in range(count)]
    assert all(each["response"]["body"]["choices"][0]["text"] == f"P{index}" for index, each in enumerate(rows))
    asked = log.read_text().split()
    # Only what was answered and not yet written down when a kill came may be asked again: four in flight, two kills.
    assert set(asked) == {f"p{index}" for index in range(count)} and len(asked) <= count + 8


def test_two_runs_at_once_and_a_changed_input_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row("a"), row("b"))
    out = str(tmp_path / "out.jsonl")
    journal = Journal(out, BatchFile(source).digest)
    with pytest.raises(ConfigError, match="another run"):
        main(["-i", source, "-o", out], lambda args: FakeApp())
    journal.close()
    write(tmp_path / "in.jsonl", row("a"), row("c"))
    with pytest.raises(ConfigError, match="--restart"):
        main(["-i", source, "-o", out], lambda args: FakeApp())
    assert main(["-q", "-i", source, "-o", out, "--restart"], lambda args: FakeApp()) == 0
    with pytest.raises(ConfigError, match="exists already"):
        main(["-i", source, "-o", out], lambda args: FakeApp())
    assert main(["-q", "-i", source, "-o", out, "--overwrite"], lambda args: FakeApp()) == 0


def test_what_cannot_be_read_or_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    def never(args: Any) -> FakeApp:
        raise AssertionError("loaded")

    source = write(tmp_path / "in.jsonl", row("a"))
    with pytest.raises(ConfigError, match="cannot be read"):
        main(["-i", str(tmp_path / "none"), "-o", str(tmp_path / "o")], never)
    with pytest.raises(ConfigError, match="cannot be written"):
        main(["-i", source, "-o", str(tmp_path / "no" / "o")], never)
    with pytest.raises(ConfigError, match="no rows"):
        main(["-i", write(tmp_path / "empty", "", "  "), "-o", str(tmp_path / "o")], never)


def test_a_row_that_is_too_large_is_not_even_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.cli.batch_file.MAX_ROW_BYTES", 500)
    file = BatchFile(write(tmp_path / "in.jsonl", row("a", "x" * 1000), row("b")))
    with pytest.raises(BadRowError, match="at most 500"):
        file.read(file.rows[0])
    assert file.read(file.rows[1]).custom_id == "b"

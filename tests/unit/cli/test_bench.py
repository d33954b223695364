"""octavo bench: the same work in each run, and a report that says what was measured on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.cli.bench import main, summarise, with_room
from octavo.config.args import EngineArgs
from octavo.errors import ConfigError

from .fakes import Maker


def test_latency_runs_the_batch_as_often_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    argv = ["latency", "m", "--batch-size", "2", "--input-len", "4", "--output-len", "3", "--num-iters", "2",
            "--num-iters-warmup", "1"]  # fmt: skip
    assert main(argv, make) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "latency"
    assert report["command"] == "octavo bench " + " ".join(argv)
    assert report["workload"] == {"input_len": 4, "output_len": 3, "batch_size": 2, "num_iters": 2,
                                  "num_iters_warmup": 1, "temperature": 1.0}  # fmt: skip
    assert len(report["iterations_s"]) == 2
    assert report["time_to_first_token_s"]["median"] == pytest.approx(0.5)
    assert report["time_per_output_token_s"]["median"] == pytest.approx(0.25)
    for key in ("date", "machine", "versions", "engine", "startup_s", "output_tokens_per_s"):
        assert report[key], key
    assert len(make.session.prompts) == 6
    assert all(len(prompt) == 4 for prompt in make.session.prompts)
    assert all(params.ignore_eos and params.max_tokens == 3 for params in make.session.params)


def test_throughput_counts_what_was_done(tmp_path: Path) -> None:
    make = Maker()
    file = tmp_path / "report.json"
    argv = [
        "throughput",
        "--num-prompts",
        "3",
        "--input-len",
        "5",
        "--output-len",
        "2",
        "--output-json",
        str(file),
        "-q",
    ]
    assert main(argv, make) == 0
    report = json.loads(file.read_text())
    assert report["num_requests"] == 3
    assert report["total_num_tokens"] == 21
    assert report["requests_per_s"] * report["elapsed_s"] == pytest.approx(3)
    assert report["engine"]["enable_prefix_caching"] is False


def test_prompts_depend_on_the_seed_only() -> None:
    prompts = []
    for seed in (1, 1, 2):
        make = Maker()
        main(
            [
                "latency",
                "--seed",
                str(seed),
                "--num-iters",
                "1",
                "--num-iters-warmup",
                "0",
                "--output-json",
                "/dev/null",
            ],
            make,
        )
        prompts.append(make.session.prompts)
    assert prompts[0] == prompts[1] != prompts[2]


def test_prefix_caching_can_be_asked_for() -> None:
    make = Maker()
    main(["throughput", "--num-prompts", "1", "--enable-prefix-caching", "--output-json", "/dev/null"], make)
    assert make.session.args.enable_prefix_caching


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latencey"], Maker()) == 2
    assert "Did you mean latency?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="at least 1"):
        main(["latency", "--batch-size", "0"], Maker())
    with pytest.raises(ConfigError, match="context holds 20"):
        main(["latency"], Maker(max_model_len=20))


def test_the_queue_takes_everything_at_once() -> None:
    assert with_room(EngineArgs(), 10_000, 8192).max_num_queued_reqs == 10_000
    assert with_room(EngineArgs(), 10_000, 8192).max_num_queued_tokens == 81_920_000
    assert with_room(EngineArgs(), 3, 5).max_num_queued_reqs == 4096
    assert with_room(EngineArgs(max_num_queued_reqs=2), 3, 5).max_num_queued_reqs == 2


def test_a_report_that_cannot_be_written_is_told_before_measuring(tmp_path: Path) -> None:
    make = Maker()
    with pytest.raises(ConfigError, match="no such folder"):
        main(["latency", "--output-json", str(tmp_path / "missing" / "x.json")], make)
    assert not make.sessions


def test_summarise_uses_nearest_ranks() -> None:
    summary = summarise([float(i) for i in range(1, 101)])
    assert summary["median"] == 50.5
    assert summary["percentiles"] == {"10": 10.0, "25": 25.0, "50": 50.0, "75": 75.0, "90": 90.0, "99": 99.0}
    assert summarise([3.0])["percentiles"]["99"] == 3.0

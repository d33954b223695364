"""octavo attention: every backend with its reason, and measured times. Red when a backend is left out, a reason is
empty, or a failing backend hides the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from octavo.attention import measure
from octavo.attention.measure import Case, Time
from octavo.attention.registry import BACKENDS
from octavo.cli.attention import main
from octavo.cli.bench_lists import write_model
from octavo.errors import ConfigError

SMALL = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--device", "cpu"]


def test_every_backend_is_listed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("auto takes ")
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert list(listed) == BACKENDS.names()
    assert listed["TORCH_SDPA"] == "usable"
    assert "NVIDIA" in listed["FLASHINFER"]
    assert listed["ENCODER_SDPA"] == "it is for encoders"


def test_the_model_says_what_its_layers_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_model(tmp_path, "m1", "tiny")), "--device", "cpu", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["spec"]["num_heads"], report["spec"]["num_kv_heads"], report["spec"]["head_dim"]) == (4, 2, 16)


def test_the_layers_of_an_encoder_look_to_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64, "num_attention_heads": 4,
              "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100,
              "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path), "--device", "cpu"]) == 0
    first, auto, *listed = capsys.readouterr().out.splitlines()
    assert "to both sides" in first and auto.startswith("auto takes ENCODER_SDPA")
    assert [line.split()[0] for line in listed if line.endswith("usable")] == ["ENCODER_SDPA"]


def test_nothing_usable_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-heads", "5", "--num-kv-heads", "2", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "auto finds none that serves these layers"


def test_times_are_measured_and_failures_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(measure.CASES, "cpu", (Case(2, 1, 40), Case(1, 20, 50)))
    monkeypatch.setitem(measure._COLD_BYTES, "cpu", 1 << 16)
    real = measure.measure

    def one_fails(name: str, *rest: object) -> Time:
        if name == "FLEX_ATTENTION":
            raise RuntimeError("no\nsuch kernel")
        return real(name, *rest)

    monkeypatch.setattr(measure, "measure", one_fails)
    assert main([*SMALL, "--bench", "--json", "-q"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert list(report["times"]) == ["decode 2 x 40", "prefill 1 x 20 after 30"]
    for times in report["times"].values():
        assert times["TORCH_SDPA"]["ms"] > 0
        assert "no\nsuch kernel" in times["FLEX_ATTENTION"]["error"]
    assert main([*SMALL, "--bench"]) == 0
    assert "FLEX_ATTENTION  failed: RuntimeError: no" in capsys.readouterr().out


def test_rates_count_each_key_once_and_each_pair_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_time", lambda *_: 1.0)
    spec = measure.AttentionSpec(4, 2, 16, 16, torch.float32, torch.float32, 0.25)
    found = measure.measure("TORCH_SDPA", spec, Case(3, 1, 100), "cpu")
    assert found.terabytes_per_s == pytest.approx(3 * 100 * 2 * 2 * 16 * 4 / 1e12)
    found = measure.measure("TORCH_SDPA", spec, Case(1, 4, 10), "cpu")
    assert found.teraflops == pytest.approx(4 * 4 * 16 * (7 + 8 + 9 + 10) / 1e12)
    windowed = measure.AttentionSpec(4, 2, 16, 16, torch.float32, torch.float32, 0.25, sliding_window=8)
    found = measure.measure("TORCH_SDPA", windowed, Case(1, 4, 10), "cpu")
    assert found.teraflops == pytest.approx(4 * 4 * 16 * (7 + 8 + 8 + 8) / 1e12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim is 0"):
        main(["--head-dim", "0"])
    with pytest.raises(ConfigError, match="logit_softcap is nan"):
        main(["--logit-softcap", "nan"])
    with pytest.raises(ConfigError, match="block_size is 20, but must be a multiple of 16 from 16 to 256"):
        main(["--block-size", "20"])
    with pytest.raises(ConfigError, match="block_size is 0"):
        main(["--block-size", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            main(["--device", "cuda", "--bench"])
    assert main([*SMALL, "--sliding-window", "9", "--logit-softcap", "2.0", "--json"]) == 0


def test_sinks_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--sinks", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["spec"]["has_sinks"]
    assert "no attention sinks" in report["backends"]["FLEX_ATTENTION"]

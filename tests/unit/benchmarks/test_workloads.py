"""The workloads never change: a new list would make every committed result incomparable. Red when a draw moves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[3] / "benchmarks" / "cpu" / "workloads.py"
DIGEST = "ed46e9ca8031cab412d7559d7a1c82feb4b7f512371ad96e2e8d4698b3e753f4"


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which is a script's neighbour and in no package."""
    spec = importlib.util.spec_from_file_location("cpu_workloads", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_lists_are_those_of_every_committed_result(workloads: ModuleType) -> None:
    assert workloads.digest(workloads.make_workloads()) == DIGEST


def test_the_digest_sees_one_changed_token(workloads: ModuleType) -> None:
    made = workloads.make_workloads()
    made["C2"].prompts[31][-1] += 1
    assert workloads.digest(made) != DIGEST


def test_sizes_are_those_that_the_descriptions_say(workloads: ModuleType) -> None:
    made = workloads.make_workloads()
    assert [(len(w.prompts), w.num_prompt_tokens, w.num_output_tokens) for w in made.values()] == [
        (1, 128, 128),
        (32, 5183, 3221),
        (1, 2048, 1),
    ]

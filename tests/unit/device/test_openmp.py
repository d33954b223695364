"""Waiting threads do not spin for milliseconds. Red when the variable is set too late, or over the user's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.device.openmp import SPIN_COUNT, limit_spinning


def test_what_the_user_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environ: dict[str, str] = {}
    assert limit_spinning(environ)
    assert environ == {"GOMP_SPINCOUNT": SPIN_COUNT}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environ = {name: "active"}
        assert not limit_spinning(environ)
        assert environ == {name: "active"}


def test_nothing_is_changed_when_torch_is_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    environ: dict[str, str] = {}
    assert not limit_spinning(environ)
    assert not environ


def test_nothing_imports_torch_before_an_engine_is_built() -> None:
    """Else the setting would come too late."""
    code = "import sys, octavo.llm, octavo.engine.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

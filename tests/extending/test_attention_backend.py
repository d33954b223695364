"""The example of docs/extending/attention-backend.md passes the tests of the built-in backends. Red when the page's
code does not work any more."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.attention.registry import choose_backend
from octavo.errors import ConfigError
from tests.unit.attention.test_torch_sdpa import SPEC, check_backend

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "attention-backend.md"


@pytest.fixture
def path(monkeypatch) -> str:
    """The page's code as a module that can be imported by name."""
    module = types.ModuleType("plain_from_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(code, module.__dict__)  # noqa: S102
    return f"{module.__name__}:PlainBackend"


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_page(path, window, softcap):
    spec = replace(SPEC, sliding_window=window, logit_softcap=softcap)
    backend, reason = choose_backend(path, spec, "cpu")
    assert path in reason
    work = [(0, 20), (33, 1), (16, 7)]
    check_backend(backend(spec), spec, work, scattered=True, padding=2, seed=1)


def test_its_reason_reaches_the_user(path):
    with pytest.raises(ConfigError, match="stores keys as torch.float32 only"):
        choose_backend(path, replace(SPEC, kv_dtype=torch.float16), "cpu")

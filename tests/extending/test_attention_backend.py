"""The examples of docs/extending/attention-backend.md: the first passes the tests of the built-in backends, the second
gives the scores that it says. Red when the page's code does not work any more."""

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
from tests.unit.attention import test_torch_sdpa as check_module
from tests.unit.attention.test_torch_sdpa import SPEC, check_backend

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "attention-backend.md"


@pytest.fixture
def path(monkeypatch) -> str:
    """The page's code as a module that can be imported by name."""
    module = types.ModuleType("plain_from_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(examples()[0], module.__dict__)  # noqa: S102
    return f"{module.__name__}:PlainBackend"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_page(path, window, softcap):
    spec = replace(SPEC, sliding_window=window, logit_softcap=softcap)
    backend, reason = choose_backend(path, spec, "cpu")
    assert path in reason
    work = [(0, 20), (33, 1), (16, 7), (50, 3)]
    check_backend(backend(spec), spec, work, scattered=True, padding=2, seed=1, is_stale=True)


def test_its_reason_reaches_the_user(path):
    with pytest.raises(ConfigError, match="stores keys as torch.float32 only"):
        choose_backend(path, replace(SPEC, kv_dtype=torch.float16), "cpu")


def test_another_score(monkeypatch):
    """The score of the page, against plain attention with a bias over a paged, scattered batch."""
    code = examples()[1]
    assert len(code.splitlines()) < 40
    namespace: dict[str, object] = {}
    exec(code, namespace)  # noqa: S102
    monkeypatch.setattr(check_module, "dense", alibi)
    backend = namespace["AlibiBackend"](SPEC)
    check_backend(backend, SPEC, [(0, 20), (33, 1), (16, 7), (5, 1)], scattered=True, padding=2)
    assert choose_backend("octavo.attention.flex:FlexBackend", SPEC, "cpu")[0].name == "FLEX_ATTENTION"


def alibi(q, k, v, spec):
    """ALiBi as its paper has it, without pages."""
    out = torch.empty_like(q)
    positions = torch.arange(len(k) - len(q), len(k))[:, None]
    distance = positions - torch.arange(len(k))
    for head in range(spec.num_heads):
        group = head * spec.num_kv_heads // spec.num_heads
        scores = q[:, head] @ k[:, group].T * spec.scale - 2.0 ** (-8.0 * (head + 1) / spec.num_heads) * distance
        out[:, head] = scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v[:, group]
    return out

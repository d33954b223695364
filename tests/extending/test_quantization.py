"""The example of docs/extending/quantization.md serves a model. Red when the page's code does not work any more."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

from octavo.quantization.registry import make_method
from tests.models.harness import PagedModel
from tests.models.hf import load_state, make_reference, model_config

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "quantization.md"
TOKENS = list(range(5, 60))


def test_the_page(monkeypatch):
    module = types.ModuleType("half_from_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(code, module.__dict__)  # noqa: S102
    reference = make_reference("tied")
    # Rounded beforehand, so that half the bits lose nothing and the logits must agree closely.
    state = {name: tensor.half().float() for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(state)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    paged = PagedModel(model_config(reference.config), method=make_method("half_from_the_page:HalfWeights"))
    load_state(paged.model, state)
    assert (paged.feed(0, TOKENS, 16) - expected).abs().max() <= 1e-4

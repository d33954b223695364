"""The example of docs/extending/weight-source.md fills a model. Red when the page's code does not work any more, or
when the loader asks a source for something that the page does not tell."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import LoadConfig
from octavo.errors import CheckpointError
from octavo.layers.context import LayerContext
from octavo.layers.parameter import collect_slots
from octavo.loader import load_weights
from octavo.loader.mapping import Placement
from octavo.models.interface import CausalLM
from octavo.models.registry import build_model
from octavo.quantization.unquantized import Unquantized

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "weight-source.md"
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=4, max_position_embeddings=16, rms_norm_eps=1e-5, rope=RopeConfig(),
    tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def load_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's code as a module that can be imported by name."""
    module = types.ModuleType("npz_from_the_page")
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(code, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:NpzSource"


def make_model() -> CausalLM:
    return build_model(CONFIG, LayerContext(torch.float32, Unquantized(), 16))


def arrays() -> dict[str, np.ndarray]:
    model = make_model()
    rng = np.random.default_rng(0)
    shapes = Placement(collect_slots(model), model.weight_map).expected()
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def load(folder: Path, load_format: str) -> CausalLM:
    model = make_model()
    load_weights(model, LoadConfig("m", str(folder), load_format, None, 0), CONFIG)
    return model


def test_example_fills_the_model(load_format: str, tmp_path: Path) -> None:
    weights = arrays()
    np.savez(tmp_path / "model.npz", **weights)
    model = load(tmp_path, load_format)
    hidden = torch.randn(3, CONFIG.hidden_size)
    expected = hidden @ torch.from_numpy(weights["model.embed_tokens.weight"]).T
    assert torch.allclose(model.compute_logits(hidden), expected, atol=1e-5)


def test_loader_checks_what_the_page_says_it_checks(load_format: str, tmp_path: Path) -> None:
    weights = arrays()
    np.savez(tmp_path / "model.npz", **weights, extra=np.zeros(1, np.float32))
    with pytest.raises(CheckpointError, match="'extra': the model has no such parameter"):
        load(tmp_path, load_format)
    np.savez(tmp_path / "model.npz", **{k: v for k, v in weights.items() if "q_proj" not in k})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*q_proj"):
        load(tmp_path, load_format)


def test_damaged_file_is_a_checkpoint_error(load_format: str, tmp_path: Path) -> None:
    (tmp_path / "model.npz").write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match=r"model\.npz"):
        load(tmp_path, load_format)
    (tmp_path / "model.npz").unlink()
    with pytest.raises(CheckpointError, match=r"model\.npz"):
        load(tmp_path, load_format)

"""load_weights on a real model class, dummy weights, the registry, and the export to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import LocatedModel, locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.config.model import ModelConfig
from octavo.config.sections import LoadConfig
from octavo.errors import CheckpointError, ConfigError
from octavo.layers.context import LayerContext
from octavo.layers.parameter import collect_slots
from octavo.loader import load_weights
from octavo.loader.dummy import DummySource
from octavo.loader.export import export_hf
from octavo.loader.gguf import GGUFSource
from octavo.loader.registry import open_source
from octavo.models.interface import CausalLM
from octavo.models.registry import build_model
from octavo.quantization.unquantized import Unquantized
from tests.unit.loader.builders import TOKENS, collect, request, tiny_config, write_gguf


def model_of(config: ModelConfig) -> CausalLM:
    return build_model(config, LayerContext(torch.float32, Unquantized(), 16))


def load(config: ModelConfig, path: Path | str, load_format: str, seed: int = 0) -> CausalLM:
    model = model_of(config)
    load_weights(model, LoadConfig(str(path), str(path), load_format, None, seed), config)
    return model


def is_complete(model: CausalLM) -> bool:
    return not any(slot.missing() for slot in collect_slots(model).values())


@pytest.mark.parametrize("quant", ["F32", "Q4_1", "Q6_K"])
def test_gguf_and_its_export_fill_the_same_model(quant: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quant=quant)
    folder = export_hf(path, tmp_path / "hf", "float32")
    from_gguf = read_model_config(LocatedModel("m", str(path), "gguf"))
    located = locate_model(str(folder))
    from_folder = read_model_config(located)
    assert located.format == "safetensors"
    for name in ("architecture", "num_heads", "num_kv_heads", "rope", "eos_token_ids", "tie_word_embeddings"):
        assert getattr(from_gguf, name) == getattr(from_folder, name)
    assert is_complete(load(from_gguf, path, "gguf"))
    assert is_complete(load(from_folder, folder, "safetensors"))
    direct = collect(GGUFSource(request(path, from_gguf)))
    written = load_file(folder / "model.safetensors")
    assert direct.keys() == written.keys()
    assert all(torch.equal(direct[name].float(), written[name]) for name in written)


def test_export_in_bfloat16_with_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quant="Q8_0")
    folder = export_hf(path, tmp_path / "hf")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    ours, theirs = load_tokenizer_data(path), load_tokenizer_data(folder)
    text = "the<|end|>path"
    assert ours.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids
    assert ours.chat_templates == theirs.chat_templates == {"default": "{{ messages }}"}
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|end|>", TOKENS.index("<|end|>"))
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        export_hf(path, tmp_path / "x", "int8")


def test_tied_model_skips_a_stored_head_and_untied_one_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    folder = export_hf(path, tmp_path / "hf", "float32")
    config = read_model_config(locate_model(str(folder)))
    assert config.tie_word_embeddings
    untied = read_model_config(locate_model(str(folder)), {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that the model needs: lm_head\.weight"):
        load(untied, folder, "safetensors")


def test_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    folder = export_hf(path, tmp_path / "hf", "float32")
    wrong = read_model_config(locate_model(str(folder)), {"intermediate_size": 512})
    with pytest.raises(CheckpointError, match=r"mlp\.(gate|up|down)_proj.*asks for"):
        load(wrong, folder, "safetensors")
    fewer = read_model_config(locate_model(str(folder)), {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*no such parameter"):
        load(fewer, folder, "safetensors")


def test_dummy_needs_only_a_config() -> None:
    assert is_complete(load(tiny_config(), "", "dummy"))


def test_dummy_depends_on_seed_and_name_alone() -> None:
    shapes = {"a.weight": (300, 64), "b.weight": (40, 9000), "n.weight": (64,), "n.bias": (64,)}

    def make(expected: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
        return collect(DummySource(request(Path(), expected=expected, load_format="dummy", seed=seed)))

    first, again, other = make(shapes, 1), make({"b.weight": (40, 9000)}, 1), make(shapes, 2)
    assert torch.equal(first["b.weight"], again["b.weight"])
    assert not torch.equal(first["a.weight"], other["a.weight"])
    assert first["a.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert first["n.weight"].mean().item() == pytest.approx(1.0, abs=0.02)
    assert first["n.bias"].mean().item() == pytest.approx(0.0, abs=0.02)
    assert first["a.weight"].unique(dim=0).shape[0] == 300


def test_unknown_load_format_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="safetensors, gguf, pt, dummy"):
        open_source("savetensors", request(Path()))
    with pytest.raises(ConfigError, match="read by load_format pt"):
        open_source("bin", request(Path()))
    with pytest.raises(ConfigError, match="cannot be imported"):
        open_source("octavo.absent:Source", request(Path()))

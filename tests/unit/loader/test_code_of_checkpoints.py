"""Python code that a checkpoint brings along does not run unasked; where nothing else could do it, that is said.

What happens when it may run: ``tests/models/test_trust_remote_code.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.errors import CheckpointError, ConfigError
from octavo.layers.context import LayerContext
from octavo.models.registry import build_model
from octavo.quantization.unquantized import Unquantized

CONFIG = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def write(folder: Path, architecture: str, model_type: str) -> Path:
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    config = {**CONFIG, "architectures": [architecture], "model_type": model_type, "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": own}))
    (folder / "evil.py").write_text(f"open({str(folder / 'trace')!r}, 'w')")
    return folder


def test_a_known_architecture_runs_with_our_code(tmp_path: Path) -> None:
    config = read_model_config(locate_model(str(write(tmp_path, "LlamaForCausalLM", "llama"))))
    assert config.code is not None
    assert not config.code.is_trusted
    assert build_model(config, LayerContext(torch.float32, Unquantized(), 16)) is not None
    assert not (tmp_path / "trace").exists()


def test_an_unknown_one_is_refused_and_the_reason_named(tmp_path: Path) -> None:
    config = read_model_config(locate_model(str(write(tmp_path, "EvilForCausalLM", "evil"))))
    with pytest.raises(ConfigError, match=r"brings Python code of its own \(evil\.py, named by auto_map") as caught:
        build_model(config, LayerContext(torch.float32, Unquantized(), 16))
    assert "EvilForCausalLM" in caught.value.message
    assert not (tmp_path / "trace").exists()


def test_a_tokenizer_that_is_only_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"comes as Python code \(evil\.Tokenizer"):
        load_tokenizer_data(write(tmp_path, "LlamaForCausalLM", "llama"))
    assert not (tmp_path / "trace").exists()

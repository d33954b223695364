"""Experts and latent attention in configs. Red when a family's word is misread or a wrong value accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import LocatedModel
from octavo.config.mla import MlaConfig
from octavo.config.model import ModelConfig
from octavo.config.moe import MoeConfig
from octavo.errors import CheckpointError

BASE: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 4, "topk_group": 2,
}  # fmt: skip


def read(folder: Path, model_type: str, **fields: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": model_type, **fields}))
    return read_model_config(LocatedModel(name="m", path=str(folder), format="none"))


def test_each_family_in_its_own_words(tmp_path: Path) -> None:
    every = (True,) * 3
    mixtral = read(tmp_path, "mixtral", num_local_experts=4)
    assert mixtral.moe == MoeConfig(4, 2, 128, every, is_normalised=True)
    qwen3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    assert read(tmp_path, "qwen3_moe", **qwen3).moe == MoeConfig(8, 3, 32, every, is_normalised=True)
    dense = read(tmp_path, "qwen3_moe", **qwen3, decoder_sparse_step=2, mlp_only_layers=[1])
    assert dense.moe is None  # of layers 0 to 2 only the second would have experts
    qwen2 = read(tmp_path, "qwen2_moe", num_experts=8, shared_expert_intermediate_size=48)
    assert qwen2.moe == MoeConfig(8, 4, 1408, every, shared_size=48, has_shared_gate=True)
    phi = read(tmp_path, "phimoe", router_jitter_noise=0.02)
    assert phi.moe == MoeConfig(16, 2, 128, every, scoring="sparsemixer", jitter=0.02)
    oss = read(tmp_path, "gpt_oss", num_local_experts=8, num_experts_per_tok=4)
    assert oss.moe is not None and oss.moe.swiglu == (1.702, 7.0) and oss.moe.has_router_bias
    assert oss.layer_windows == (128, None, 128)
    assert read(tmp_path, "llama").moe is None


def test_latent_attention_becomes_heads_of_both_parts(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
    config = read(tmp_path, "deepseek_v3", **DEEPSEEK, rope_scaling=yarn)
    assert config.mla == MlaConfig(None, 24, 128, 64, 128)
    assert (config.head_dim, config.num_kv_heads) == (192, 4)
    assert int(config.head_dim * config.rope.partial_rotary_factor) == 64
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)
    moe = config.moe
    assert moe is not None
    assert (moe.layers, moe.shared_size, moe.scoring, moe.scale) == ((False, True, True), 64, "sigmoid", 2.5)
    plain = read(tmp_path, "deepseek_v2", **DEEPSEEK)
    assert plain.attention_scale == pytest.approx(192**-0.5)
    assert plain.moe is not None and plain.moe.num_groups == 1


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 200}, "a token has 200 experts, but must have between 1 and 128"),
        ("qwen3_moe", {"moe_intermediate_size": "big"}, "moe_intermediate_size is 'big'"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of layer numbers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is set"),
        ("phimoe", {"num_experts_per_tok": 3}, "chooses 2"),
        ("deepseek_v2", {**DEEPSEEK, "topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v2", {**DEEPSEEK, "norm_topk_prob": True}, "norm_topk_prob is true"),
        ("deepseek_v3", {**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {**DEEPSEEK, "qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ("deepseek_v3", {**DEEPSEEK, "v_head_dim": 500}, "v_head_dim is 500"),
        ("deepseek_v3", {**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v3", {**DEEPSEEK, "n_group": 3}, "do not fit together"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(tmp_path, model_type, **fields)
    assert "config.json" in caught.value.message

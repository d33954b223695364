"""A config.json that states sizes only means what transformers takes it to mean.

Red when a family's default is missing from ``checkpoint/families.py`` or is another than transformers'.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.families import ARCHITECTURES, DEFAULTS, DIMENSIONS, READERS
from octavo.checkpoint.locate import locate_model

SIZES = {
    "vocab_size": 260000, "hidden_size": 4096, "intermediate_size": 640, "num_hidden_layers": 12,
    "num_attention_heads": 32,
}  # fmt: skip
TYPES = sorted(set(ARCHITECTURES) - {"deepseek_v2", "deepseek_v3"})
"""Those of latent attention say nothing of heads in these words."""


def windows_of(config: Any) -> list[int | None]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def ropes_of(config: Any) -> list[dict[str, Any] | None]:
    """Per layer; None for one without positions."""
    ropes = config.rope_parameters
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    if "rope_theta" in ropes:
        ropes = {"full_attention": ropes, "sliding_attention": ropes}
    return [ropes[kind] if is_rotated else None for kind, is_rotated in zip(kinds, rotated, strict=True)]


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    reference: Any = CONFIG_MAPPING[model_type](**SIZES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}))
    config = read_model_config(locate_model(str(tmp_path)))
    assert config.architecture == ARCHITECTURES[model_type]
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == (getattr(reference, "head_dim", None) or 128)
    assert config.max_position_embeddings == reference.max_position_embeddings
    epsilons = [getattr(reference, name, None) for name in ("rms_norm_eps", "layer_norm_eps")]
    assert config.rms_norm_eps in epsilons
    assert config.hidden_act == getattr(reference, "hidden_activation", getattr(reference, "hidden_act", None))
    assert config.tie_word_embeddings == getattr(reference, "tie_word_embeddings", False)
    longest = reference.max_position_embeddings
    assert list(config.windows) == [w if w is None or w < longest else None for w in windows_of(reference)]
    for ours, theirs in zip(config.ropes, ropes_of(reference), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.theta == theirs["rope_theta"]
            assert ours.partial_rotary_factor == theirs.get("partial_rotary_factor", 1.0)
            if model_type not in ("gpt_oss", "ministral3"):  # their files always state their scaling
                assert ours.scaling.get("rope_type", "default") == theirs["rope_type"]
    assert config.attention_softcap == getattr(reference, "attn_logit_softcapping", None)
    assert config.logit_softcap == getattr(reference, "final_logit_softcapping", None)
    scale = getattr(reference, "query_pre_attn_scalar", None)
    scale = getattr(reference, "attention_multiplier", None) if scale is None else scale**-0.5
    assert config.attention_scale == scale


STRAY: dict[str, Any] = {
    "attention_multiplier": 0.3, "attn_logit_softcapping": 7.0, "embedding_multiplier": 3.0,
    "final_logit_softcapping": 9.0, "hidden_activation": "relu", "layer_types": ["sliding_attention"] * 12,
    "llama_4_scaling_beta": 0.5, "logits_scaling": 3.0, "max_window_layers": 2, "no_rope_layer_interval": 3,
    "no_rope_layers": [0, 1] * 6, "query_pre_attn_scalar": 3, "residual_multiplier": 0.3, "rope_local_base_freq": 5.0,
    "sliding_window": 16, "sliding_window_pattern": 3, "use_sliding_window": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_fields_of_other_families_mean_nothing(model_type: str, tmp_path: Path) -> None:
    """Files carry along what they were converted from; transformers' classes do not look at it either."""
    assert STRAY.keys() == READERS.keys()
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    stray = {name: value for name, value in STRAY.items() if model_type not in READERS[name]}
    found: list[Any] = []
    for more in ({}, stray):
        stated = {"model_type": model_type, **SIZES, "rope_scaling": {**rope, **more}, **more}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        found.append(replace(read_model_config(locate_model(str(tmp_path))), hf={}))
    assert found[0] == found[1]


OUR_WORDS = frozenset({"llama_4_scaling_beta", "rope_local_base_freq", "sliding_window_pattern"})
"""Of older files, or within ``rope_parameters``: transformers' classes have no attribute for them."""
BEYOND = frozenset(
    {("attn_logit_softcapping", "gemma3_text")}  # read there, and never used
    | {("sliding_window", "qwen3_vl_moe_text"), ("sliding_window", "qwen3_omni_moe_text")}  # always null there
    | {("hidden_activation", "gemma"), ("max_window_layers", "smollm3")}  # in released files
    | {("attention_multiplier", "deepseek_v2"), ("attention_multiplier", "deepseek_v3")}  # set by ``expand_mla``
)


@pytest.mark.parametrize("name", sorted(READERS.keys() - OUR_WORDS))
def test_readers_of_a_field_are_those_whose_class_has_it(name: str) -> None:
    theirs = {each for each in DEFAULTS if hasattr(CONFIG_MAPPING[each](), name)}
    assert {each for each in theirs ^ READERS[name] if (name, each) not in BEYOND} == set()


@pytest.mark.parametrize("model_type", sorted(DIMENSIONS))
def test_sizes_of_a_text_half_that_states_none(model_type: str, tmp_path: Path) -> None:
    reference: Any = CONFIG_MAPPING[model_type]()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "text_config": {"model_type": model_type}}))
    config = read_model_config(locate_model(str(tmp_path)))
    assert config.text_half_of is not None
    assert (config.vocab_size, config.hidden_size) == (reference.vocab_size, reference.hidden_size)
    assert (config.intermediate_size, config.num_layers) == (reference.intermediate_size, reference.num_hidden_layers)
    assert (config.num_heads, config.num_kv_heads) == (reference.num_attention_heads, reference.num_key_value_heads)

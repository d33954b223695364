"""Frequencies of each RoPE type against transformers', and what is refused. Red when a formula or a default changes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.config.model import RopeConfig
from octavo.errors import ConfigError
from octavo.layers.rotary import Rotary, rope_frequencies, rotate_heads

SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
        "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_equal_transformers(scaling):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    got, magnitude = rope_frequencies(RopeConfig(500000.0, scaling), 64, 131072, 131072)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert magnitude == pytest.approx(factor)


@pytest.mark.parametrize("served", [4096, 4097])
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}, {"factor": 8.0}], ids=str)
def test_longrope_equals_transformers_on_both_sides_of_its_length(served, more):
    factors = {"short_factor": [1.0 + i / 32 for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **factors, **more}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=served)
    got, magnitude = rope_frequencies(RopeConfig(10000.0, scaling), 64, served, 131072)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert magnitude == pytest.approx(factor)


def test_layers_without_positions_are_not_rotated():
    rotary = Rotary(None, 16, 10, 10, torch.device("cpu"))
    assert rotary.head_order.tolist() == list(range(16))
    heads = torch.randn(2, 3, 16)
    before = heads.clone()
    rotate_heads(heads, rotary.forward(torch.tensor([0, 3])).rows())
    assert torch.equal(heads, before)


def test_partial_rotation_and_table():
    rotary = Rotary(RopeConfig(partial_rotary_factor=0.5), 16, 10, 10, torch.device("cpu"))
    assert rotary.rotary_dim == 8
    rotation = rotary.forward(torch.tensor([0, 3])).rows()
    torch.testing.assert_close(rotation[0], torch.ones(4, dtype=torch.complex64))
    torch.testing.assert_close(rotation[1, 0].angle(), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "magic"}, "'magic' is not supported; supported: default, linear, llama3, yarn, dynamic, long"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, "needs a list 'long_factor' of 32 numbers"),
        ({"rope_type": "linear"}, "needs a positive number 'factor'"),
        ({"rope_type": "linear", "factor": "2"}, "needs a positive number 'factor'"),
        ({"rope_type": "yarn", "factor": float("nan")}, "needs a positive number 'factor'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "lower max_model_len from 8192"),
    ],
)
def test_what_is_refused(scaling, message):
    with pytest.raises(ConfigError, match=message):
        rope_frequencies(RopeConfig(scaling=scaling), 64, 8192, 4096)


def test_dynamic_within_the_trained_length_is_plain():
    plain, _ = rope_frequencies(RopeConfig(), 64, 4096, 4096)
    dynamic, _ = rope_frequencies(RopeConfig(scaling={"rope_type": "dynamic", "factor": 2.0}), 64, 4096, 4096)
    assert torch.equal(plain, dynamic)

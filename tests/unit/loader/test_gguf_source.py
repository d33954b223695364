"""GGUF weights against the gguf package's own decoding. Red when a block type, a name or a row order is wrong."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from octavo.errors import CheckpointError
from octavo.loader import gguf as gguf_source
from octavo.loader.gguf import GGUFSource
from octavo.loader.gguf_names import hf_name
from tests.unit.loader.builders import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    collect,
    raw_blocks,
    request,
    tiny_config,
    write_gguf,
    write_gguf_file,
)

TYPES = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q2_K",
    "Q3_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ1_S",
    "IQ1_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
]


def permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter, restated: halves of a head become neighbours."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("quant", TYPES)
def test_every_type_equals_the_reference(quant: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = write_gguf(path, quant=quant, arch="qwen3")  # no reordering of rows
    loaded = collect(GGUFSource(request(path)))
    assert loaded.keys() == {hf_name(name) for name in raw}
    kind = GGMLQuantizationType[quant]
    for name, stored in raw.items():
        expected = stored if stored.ndim == 1 else gguf.quants.dequantize(stored, kind)
        assert np.isfinite(expected).all()
        assert np.array_equal(loaded[hf_name(name)].float().numpy(), expected), name


@pytest.mark.parametrize("slice_values", [256, 256 * 64, 256 * 100, 1 << 22])
def test_slices_of_any_size_give_the_same(slice_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quant="Q4_1")
    whole = collect(GGUFSource(request(path)))
    monkeypatch.setattr(gguf_source, "_SLICE_VALUES", slice_values)
    sliced = collect(GGUFSource(request(path)))
    assert whole.keys() == sliced.keys()
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K"])
def test_stacked_experts_are_taken_apart(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, path = GGMLQuantizationType[quant], tmp_path / "m.gguf"
    raw = raw_blocks(quant, 3 * 5, HIDDEN, seed=3).reshape(3, 5, -1)
    gate = np.ones(HIDDEN, np.float32)
    tensors = {"blk.2.ffn_up_exps.weight": raw, "blk.2.ffn_gate_inp_shexp.weight": gate}
    write_gguf_file(path, "qwen3moe", {}, tensors, quant)
    monkeypatch.setattr(gguf_source, "_SLICE_VALUES", 2 * HIDDEN)
    loaded = collect(GGUFSource(request(path)))
    whole = raw if quant == "F32" else gguf.quants.dequantize(raw, kind)
    assert loaded.pop("model.layers.2.mlp.shared_expert_gate.weight").shape == (1, HIDDEN)
    assert len(loaded) == 3
    for index in range(3):
        expert = loaded[f"model.layers.2.mlp.experts.{index}.up_proj.weight"]
        assert np.array_equal(expert.numpy(), whole[index])


def test_llama_queries_and_keys_get_their_order_back(tmp_path: Path) -> None:
    original = {
        "attn_q": np.random.default_rng(1).standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
        "attn_k": np.random.default_rng(2).standard_normal((HIDDEN // 2, HIDDEN)).astype(np.float32),
    }
    bias = np.arange(HIDDEN, dtype=np.float32)
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={
        "blk.7.attn_q.weight": permute(original["attn_q"], HEADS),
        "blk.7.attn_k.weight": permute(original["attn_k"], KV_HEADS),
        "blk.7.attn_q.bias": permute(bias, HEADS),
    })  # fmt: skip
    loaded = collect(GGUFSource(request(path)))
    assert np.array_equal(loaded["model.layers.7.self_attn.q_proj.weight"].numpy(), original["attn_q"])
    assert np.array_equal(loaded["model.layers.7.self_attn.k_proj.weight"].numpy(), original["attn_k"])
    assert np.array_equal(loaded["model.layers.7.self_attn.q_proj.bias"].numpy(), bias)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.11.ffn_norm.weight", "model.layers.11.post_attention_layernorm.weight"),
        ("blk.3.attn_v.bias", "model.layers.3.self_attn.v_proj.bias"),
        ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_gate_exps.weight"),
        ("v.blk.0.attn_q.weight", "v.blk.0.attn_q.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert hf_name(name) == expected


def test_rope_factors_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"rope_freqs.weight": np.ones(HIDDEN // HEADS // 2, np.float32)})
    assert not any("rope" in name for name, _ in GGUFSource(request(path)).tensors(lambda _: True))


def test_heads_that_contradict_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*speaks of 8 heads of 64"):
        collect(GGUFSource(request(path, tiny_config(num_heads=8))))


def test_consumer_may_stop_early(tmp_path: Path) -> None:
    """An error in the middle of a load must not leave threads behind that wait for ever."""
    path = tmp_path / "m.gguf"
    write_gguf(path, quant="Q8_0")
    tensors = GGUFSource(request(path)).tensors(lambda _: True)
    next(tensors)
    tensors.close()


def test_blocks_made_here_are_what_the_reference_makes() -> None:
    """The K-quant blocks of the builder are random bytes; their scales must survive as numbers."""
    for quant in ("Q4_K", "Q5_K", "Q6_K"):
        values = gguf.quants.dequantize(raw_blocks(quant, 4, 512, seed=3), GGMLQuantizationType[quant])
        assert values.shape == (4, 512)
        assert 0.01 < np.abs(values).max() < 100

"""Small model files for the tests of reading: GGUF through the gguf package's writer, safetensors byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from octavo.config.model import ModelConfig, RopeConfig
from octavo.config.sections import LoadConfig
from octavo.loader.source import LoadRequest, RowSlice, WeightSource

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 256, 2, 4, 2, 256
TOKENS = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "th", "the", "<|end|>", "<tool>"]
MERGES = ["t h", "th e"]
SCALE_LAST = ("Q2_K", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0")
TYPES = [1] * (len(TOKENS) - 2) + [3, 4]


def tiny_config(**changes: Any) -> ModelConfig:
    """The config of what ``write_gguf`` writes."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocab_size": len(TOKENS), "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope": RopeConfig(),
        "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def raw_blocks(quant: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Valid blocks of any type: quantised from normal values where gguf can, else random bytes with finite scales."""
    kind = GGMLQuantizationType[quant]
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    if quant == "F32":
        return values
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows * columns // block_values, block_bytes), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        if quant in SCALE_LAST:
            blocks[:, -2:] = scale
            if quant == "Q2_K":
                blocks[:, -4:-2] = scale
        elif quant == "IQ1_M":  # the scale's bits are spread over four numbers
            blocks[:, -8::2], blocks[:, -7::2] = 0, 0x20
        elif quant == "MXFP4":
            blocks[:, 0] = 120
        else:
            blocks[:, :2] = blocks[:, 2:4] = scale
        return blocks.reshape(rows, -1)


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """GGUF name to shape of every tensor of the tiny model."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{i}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, FFN),
        }
    return shapes


def write_gguf(path: Path, *, quant: str = "F32", arch: str = "llama", metadata: dict[str, Any] | None = None,
               extra: dict[str, np.ndarray] | None = None,
               tensors_per_part: int = 0) -> dict[str, np.ndarray]:  # fmt: skip
    """Write the tiny model; ``metadata`` replaces keys (None leaves one out). Returns raw tensors by GGUF name."""
    keys: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|end|>"),
        "tokenizer.chat_template": "{{ messages }}",
    } | (metadata or {})
    tensors: dict[str, np.ndarray] = {}
    for index, (name, shape) in enumerate(tensor_shapes().items()):
        kind = quant if len(shape) == 2 else "F32"
        raw = raw_blocks(kind, *shape, seed=index) if len(shape) == 2 else np.full(shape, 1 + index / 64, np.float32)
        tensors[name] = raw
    tensors |= extra or {}
    write_gguf_file(path, arch, keys, tensors, quant, tensors_per_part)
    return tensors


def write_gguf_file(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
                    quant: str = "F32", tensors_per_part: int = 0) -> None:  # fmt: skip
    """Write any GGUF file: keys by the kind of their value (None is left out), bytes as blocks of type ``quant``."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_part)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[quant] if array.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def request(path: Path, config: ModelConfig | None = None, expected: dict[str, tuple[int, ...]] | None = None,
            load_format: str = "gguf", seed: int = 0) -> LoadRequest:  # fmt: skip
    """What a source is constructed with."""
    return LoadRequest(
        LoadConfig(str(path), str(path), load_format, None, seed), config or tiny_config(), expected or {}
    )


def collect(source: WeightSource) -> dict[str, torch.Tensor]:
    """Everything that a source yields, slices put together and checked to cover each tensor once."""
    result: dict[str, torch.Tensor] = {}
    missing: dict[str, set[int]] = {}
    for name, piece in source.tensors(lambda _: True):
        if not isinstance(piece, RowSlice):
            assert name not in result
            result[name] = piece.clone()
            continue
        rows = range(piece.row_start, piece.row_start + piece.tensor.shape[0])
        whole = result.setdefault(name, torch.empty(piece.full_shape, dtype=piece.tensor.dtype))
        left = missing.setdefault(name, set(range(len(whole))))
        assert left.issuperset(rows)
        left.difference_update(rows)
        whole[rows.start : rows.stop] = piece.tensor
    assert not any(missing.values())
    return result


def hf_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face names, of odd sizes."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (50, 6),
        "model.norm.weight": (6,),
        "model.layers.0.mlp.up_proj.weight": (9, 6),
    }
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def write_sharded(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """One tensor a file, with the index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, (name, tensor) in enumerate(weights.items()):
        file = f"model-{i + 1:05}-of-{len(weights):05}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header: an object to be dumped, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data

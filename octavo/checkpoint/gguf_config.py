"""GGUF metadata in the words of Hugging Face's config.json and generation_config.json.

Knows what the keys mean that all architectures have; what one has beside them is in ``gguf_families.py``. Checks only
what it needs to translate: the result is checked like any config.json by ``config_reader.py``.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from typing import Any, cast

from octavo.checkpoint.gguf_families import FAMILIES, Family
from octavo.checkpoint.gguf_file import GGUFFile, GGUFTensor
from octavo.checkpoint.gguf_header import GGUFHeader
from octavo.checkpoint.rope import scaling_from_factors

STORED_AS = "gguf_stored_as"
"""Key of the result that Hugging Face does not know: the type of most of the weights, if they are packed."""
_FLOATS = frozenset({"F32", "F16", "BF16"})
_CONTROL = 3
_END_OF_TURN = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"})
"""Control tokens that end a turn whatever the file calls its eos: many files name only one of several."""
_END_OF_HARMONY = frozenset({"<|return|>", "<|call|>"})
"""The same in gpt-oss's format, where ``<|end|>`` stands behind every part of an answer."""
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


CONFIG_STRINGS = ("tokenizer.ggml.tokens",)
"""Lists of strings that are looked at here."""


def gguf_to_hf_config(gguf: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate a header.

    Returns:
        (config, generation config).

    Raises:
        CheckpointError: The architecture is not known, or a key or tensor that it needs is missing or contradicts
            another.
    """
    header = GGUFHeader(gguf)
    arch = gguf.metadata.get("general.architecture")
    family = FAMILIES.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise header.error(f"general.architecture is {arch!r:.60}, but only {', '.join(sorted(FAMILIES))} can be read")
    if header.get("expert_count") and not family.has_experts:
        raise header.error(
            f"{arch}.expert_count is {header.get('expert_count')}: mixtures of experts of this family cannot be read"
        )
    config = _common(header, family)
    family.add(header, config)
    _add_token_ids(gguf, config)
    generation = {name: gguf.metadata[key] for key, name in _SAMPLING.items() if key in gguf.metadata}
    return config, generation


def _common(header: GGUFHeader, family: Family) -> dict[str, Any]:
    """What all decoders have."""
    gguf, arch = header.gguf, header.prefix
    hidden = header.integer("embedding_length")
    num_heads = header.integer("attention.head_count")
    head_dim = _head_dim(header, hidden // max(1, num_heads), family)
    rotary_dim = header.integer("rope.dimension_count", head_dim)
    if not 0 < rotary_dim <= head_dim:
        raise header.error(f"{arch}.rope.dimension_count is {rotary_dim}, but heads have {head_dim} values")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": _vocab_size(header, hidden),
        "hidden_size": hidden,
        "intermediate_size": header.integer("feed_forward_length"),
        "num_hidden_layers": header.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.integer("context_length"),
        "rope_theta": header.get("rope.freq_base", 10000.0),
        "hidden_act": family.hidden_act,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "torch_dtype": _dtype(gguf),
    }
    if header.get("attention.layer_norm_epsilon") is not None:
        config["layer_norm_eps"] = header.get("attention.layer_norm_epsilon")
    else:
        config["rms_norm_eps"] = header.get("attention.layer_norm_rms_epsilon", 1e-6)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _rope_scaling(header, config, rotary_dim)
    if scaling:
        config["rope_scaling"] = scaling
    window = header.get("attention.sliding_window")
    if window:
        config["sliding_window"] = window
    stored_as = _stored_as(gguf)
    if stored_as is not None:
        config[STORED_AS] = stored_as
    if header.get("pooling_type") is not None:
        config["gguf_pooling_type"] = header.get("pooling_type")
    return config


def _head_dim(header: GGUFHeader, usual: int, family: Family) -> int:
    """Of keys and, but for latent attention, values."""
    if family.has_latent_heads and header.get("attention.key_length_mla") is not None:
        return header.integer("attention.key_length_mla")  # key_length is then that of the latent vectors
    head_dim = header.integer("attention.key_length", usual)
    if not family.has_latent_heads and header.integer("attention.value_length", head_dim) != head_dim:
        raise header.error(f"{header.prefix}.attention.value_length differs from key_length, which is not supported")
    return head_dim


def _vocab_size(header: GGUFHeader, hidden: int) -> int:
    embedding = header.gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.error("is missing", "token_embd.weight")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise header.error(
            f"has shape {list(embedding.shape)}, but {header.prefix}.embedding_length is {hidden}", embedding.name
        )
    rows = embedding.shape[0]
    stated = header.integer("vocab_size", rows)
    tokens = header.gguf.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(cast("list[Any]", tokens)) if isinstance(tokens, list) else 0
    if stated != rows or num_tokens > rows:
        raise header.error(
            f"has {rows} rows, but {header.prefix}.vocab_size is {stated} and the tokenizer has {num_tokens} tokens",
            embedding.name,
        )
    return rows


def _dtype(gguf: GGUFFile) -> str:
    """The float type of the matrices. Packed ones say nothing of their origin: bfloat16 holds the range of any."""
    kinds = {t.quant_type for t in gguf.tensors.values() if len(t.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if "F16" in kinds and kinds <= {"F16", "F32"} else "bfloat16"


def _stored_as(gguf: GGUFFile) -> str | None:
    """The type in which most weights are packed; None where most are floats."""
    sizes = Counter[str]()
    for tensor in gguf.tensors.values():
        sizes[tensor.quant_type] += math.prod(tensor.shape)
    kind = max(sizes, key=lambda name: sizes[name], default="F32")
    return None if kind in _FLOATS else kind


def _factors(header: GGUFHeader, tensor: GGUFTensor, rotary_dim: int) -> list[float]:
    """A tensor of divisors of the rotary frequencies."""
    if tensor.quant_type != "F32" or tensor.shape != (rotary_dim // 2,):
        raise header.error(
            f"is {tensor.quant_type} {list(tensor.shape)}, but must be F32 [{rotary_dim // 2}]", tensor.name
        )
    values = struct.unpack(f"<{rotary_dim // 2}f", header.gguf.view(tensor))
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise header.error("holds a divisor that is not a positive number", tensor.name)
    return list(values)


def _rope_scaling(header: GGUFHeader, config: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
    tensors = header.gguf.tensors
    short, long = tensors.get("rope_factors_short.weight"), tensors.get("rope_factors_long.weight")
    if short is not None and long is not None:
        return _longrope(header, config, _factors(header, short, rotary_dim), _factors(header, long, rotary_dim))
    factors = tensors.get("rope_freqs.weight")
    if factors is not None:
        theta = config["rope_theta"]
        if not isinstance(theta, float) or not 0 < theta < math.inf:
            raise header.error(f"{header.prefix}.rope.freq_base is {theta!r:.60}, but must be a positive number")
        return scaling_from_factors(_factors(header, factors, rotary_dim), theta, config["max_position_embeddings"])
    kind = header.get("rope.scaling.type")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    if kind is None and factor is not None:
        kind = "linear"
    if kind in (None, "none") or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind not in ("linear", "yarn"):
        raise header.error(f"{header.prefix}.rope.scaling.type is {kind!r:.60}, but only linear and yarn can be read")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    for key, name in (
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("rope.scaling.attn_factor", "attention_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ):
        value = header.get(key)
        if value is not None:
            scaling[name] = value
    return scaling


def _longrope(header: GGUFHeader, config: dict[str, Any], short: list[float], long: list[float]) -> dict[str, Any]:
    original = header.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    scaling: dict[str, Any] = {
        "rope_type": "longrope", "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    factor = header.get("rope.scaling.attn_factor")
    if factor is not None:
        scaling["attention_factor"] = factor
    return scaling


def _add_token_ids(gguf: GGUFFile, config: dict[str, Any]) -> None:
    metadata = gguf.metadata
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos not in (None, 0xFFFFFFFF):
        config["bos_token_id"] = bos
    names = ("eos", "eot", "eom")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    found = [index for index in eos if index not in (None, 0xFFFFFFFF)]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = zip(cast("list[Any]", tokens), cast("list[Any]", types), strict=False)
        control = {token: index for index, (token, kind) in enumerate(pairs) if kind == _CONTROL}
        is_harmony = control.keys() >= _END_OF_HARMONY
        ends = _END_OF_HARMONY if is_harmony else _END_OF_TURN
        found += [index for token, index in control.items() if token in ends]
        if is_harmony:
            found = [index for index in found if index != control.get("<|end|>")]
    if found:
        config["eos_token_id"] = list(dict.fromkeys(found))

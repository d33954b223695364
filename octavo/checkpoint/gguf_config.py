"""GGUF metadata in the words of Hugging Face's config.json and generation_config.json.

Knows which key means what, for the architectures below; checks only what it needs to translate. The result is checked
like any config.json by ``config_reader.py``.
"""

from __future__ import annotations

import math
import struct
from typing import Any, cast

from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.rope import scaling_from_factors
from octavo.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CONTROL = 3
_END_OF_TURN = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"})
"""Control tokens that end a turn whatever the file calls its eos: many files name only one of several."""
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def gguf_to_hf_config(gguf: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate a header.

    Returns:
        (config, generation config).

    Raises:
        CheckpointError: The architecture is not known, or a key or tensor that it needs is missing or contradicts
            another.
    """
    header = _Reader(gguf)
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise header.error(
            f"general.architecture is {arch!r:.60}, but only {', '.join(sorted(ARCHITECTURES))} can be read"
        )
    parts = gguf.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise header.error(f"is one of {parts} parts (split.count); merge them with llama.cpp's gguf-split first")
    if header.get("expert_count"):
        raise header.error(f"{arch}.expert_count is {header.get('expert_count')}: mixtures of experts cannot be read")
    hidden = header.integer("embedding_length")
    num_heads = header.integer("attention.head_count")
    head_dim = header.integer("attention.key_length", hidden // max(1, num_heads))
    if header.integer("attention.value_length", head_dim) != head_dim:
        raise header.error(f"{arch}.attention.value_length differs from key_length, which is not supported")
    rotary_dim = header.integer("rope.dimension_count", head_dim)
    if not 0 < rotary_dim <= head_dim:
        raise header.error(f"{arch}.rope.dimension_count is {rotary_dim}, but heads have {head_dim} values")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": _vocab_size(header, hidden),
        "hidden_size": hidden,
        "intermediate_size": header.integer("feed_forward_length"),
        "num_hidden_layers": header.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.integer("context_length"),
        "rms_norm_eps": header.get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": header.get("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "torch_dtype": _dtype(gguf),
    }
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _rope_scaling(header, config, rotary_dim)
    if scaling:
        config["rope_scaling"] = scaling
    window = header.get("attention.sliding_window")
    if window:
        config["sliding_window"] = window
    _add_token_ids(gguf, config)
    generation = {name: gguf.metadata[key] for key, name in _SAMPLING.items() if key in gguf.metadata}
    return config, generation


class _Reader:
    """Keys of the file's own architecture."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.file = str(gguf.path)
        self.prefix = gguf.metadata.get("general.architecture")

    def error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.file, reason, tensor=tensor)

    def get(self, key: str, default: Any = None) -> Any:
        return self.gguf.metadata.get(f"{self.prefix}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; a list with one value per layer is accepted when all are the same."""
        value = self.get(key, default)
        items = cast("list[Any]", value) if isinstance(value, list) else []
        if items:
            if any(item != items[0] for item in items):
                raise self.error(f"{self.prefix}.{key} differs between layers, which is not supported")
            return self.checked(key, items[0])
        return self.checked(key, value)

    def checked(self, key: str, value: Any) -> int:
        if value is None:
            raise self.error(f"the metadata key {self.prefix}.{key} is missing")
        if type(value) is not int or value < 0:
            raise self.error(f"{self.prefix}.{key} is {value!r:.60}, but must be an integer")
        return value


def _vocab_size(header: _Reader, hidden: int) -> int:
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


def _rope_scaling(header: _Reader, config: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
    factors = header.gguf.tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.quant_type != "F32" or factors.shape != (rotary_dim // 2,):
            raise header.error(
                f"is {factors.quant_type} {list(factors.shape)}, but must be F32 [{rotary_dim // 2}]", factors.name
            )
        values = struct.unpack(f"<{rotary_dim // 2}f", header.gguf.read(factors))
        if not all(math.isfinite(v) and v > 0 for v in values):
            raise header.error("holds a divisor that is not a positive number", factors.name)
        theta = config["rope_theta"]
        if not isinstance(theta, float) or not 0 < theta < math.inf:
            raise header.error(f"{header.prefix}.rope.freq_base is {theta!r:.60}, but must be a positive number")
        return scaling_from_factors(values, theta, config["max_position_embeddings"])
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
        found += [i for i, (token, kind) in enumerate(pairs) if kind == _CONTROL and token in _END_OF_TURN]
    if found:
        config["eos_token_id"] = list(dict.fromkeys(found))

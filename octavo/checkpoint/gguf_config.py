"""GGUF metadata in the words of Hugging Face's config.json and generation_config.json.

Knows which key means what, for the architectures below; checks only what it needs to translate. What a family has
beside the keys that all have is in ``_FAMILIES``, one function each. The result is checked like any config.json by
``config_reader.py``.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from octavo.checkpoint.gguf_file import GGUFFile, GGUFTensor
from octavo.checkpoint.rope import scaling_from_factors
from octavo.errors import CheckpointError

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
    header = _Reader(gguf)
    arch = gguf.metadata.get("general.architecture")
    family = _FAMILIES.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise header.error(f"general.architecture is {arch!r:.60}, but only {', '.join(sorted(_FAMILIES))} can be read")
    if header.get("expert_count") and not family.has_experts:
        raise header.error(
            f"{arch}.expert_count is {header.get('expert_count')}: mixtures of experts of this family cannot be read"
        )
    config = _common(header, family)
    family.add(header, config)
    _add_token_ids(gguf, config)
    generation = {name: gguf.metadata[key] for key, name in _SAMPLING.items() if key in gguf.metadata}
    return config, generation


def _common(header: _Reader, family: _Family) -> dict[str, Any]:
    """What all decoders have."""
    gguf, arch = header.gguf, header.prefix
    hidden = header.integer("embedding_length")
    num_heads = header.integer("attention.head_count")
    head_dim = header.integer("attention.key_length", hidden // max(1, num_heads))
    if header.integer("attention.value_length", head_dim) != head_dim:
        raise header.error(f"{arch}.attention.value_length differs from key_length, which is not supported")
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


def _stored_as(gguf: GGUFFile) -> str | None:
    """The type in which most weights are packed; None where most are floats."""
    sizes = Counter[str]()
    for tensor in gguf.tensors.values():
        sizes[tensor.quant_type] += math.prod(tensor.shape)
    kind = max(sizes, key=lambda name: sizes[name], default="F32")
    return None if kind in _FLOATS else kind


def _factors(header: _Reader, tensor: GGUFTensor, rotary_dim: int) -> list[float]:
    """A tensor of divisors of the rotary frequencies."""
    if tensor.quant_type != "F32" or tensor.shape != (rotary_dim // 2,):
        raise header.error(
            f"is {tensor.quant_type} {list(tensor.shape)}, but must be F32 [{rotary_dim // 2}]", tensor.name
        )
    values = struct.unpack(f"<{rotary_dim // 2}f", header.gguf.view(tensor))
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise header.error("holds a divisor that is not a positive number", tensor.name)
    return list(values)


def _rope_scaling(header: _Reader, config: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
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


def _longrope(header: _Reader, config: dict[str, Any], short: list[float], long: list[float]) -> dict[str, Any]:
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


# --- families ---


def _nothing(header: _Reader, config: dict[str, Any]) -> None:
    """A family that has no more than all have."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture of GGUF is called in config.json, and what it has of its own."""

    architecture: str
    model_type: str
    hidden_act: str = "silu"
    add: Callable[[_Reader, dict[str, Any]], None] = _nothing
    has_experts: bool = False


def _llama(header: _Reader, config: dict[str, Any]) -> None:
    """Llama and Mistral; with experts it is Mixtral."""
    if header.get("attention.temperature_scale") is not None:
        raise header.error(f"{header.prefix}.attention.temperature_scale is set, which is not supported")
    if not header.get("expert_count"):
        return
    config["architectures"], config["model_type"] = ["MixtralForCausalLM"], "mixtral"
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])


def _mistral(header: _Reader, config: dict[str, Any]) -> None:
    if header.get("expert_count"):
        raise header.error(f"{header.prefix}.expert_count is set: this family's experts cannot be read")
    _llama(header, config)
    config.setdefault("sliding_window", 0)


def _granite(header: _Reader, config: dict[str, Any]) -> None:
    for key, name in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        if header.get(key) is not None:
            config[name] = header.get(key)


def _granitemoe(header: _Reader, config: dict[str, Any]) -> None:
    if header.get("expert_shared_feed_forward_length"):
        raise header.error(f"{header.prefix}.expert_shared_feed_forward_length is set, which is not supported")
    _granite(header, config)
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])


def _gpt_oss(header: _Reader, config: dict[str, Any]) -> None:
    config["num_local_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    config["intermediate_size"] = header.integer("expert_feed_forward_length", config["intermediate_size"])
    if config.get("rope_scaling"):
        config["rope_scaling"]["truncate"] = False  # not in the header: it belongs to the family


def _olmo2(header: _Reader, config: dict[str, Any]) -> None:  # noqa: ARG001
    """Olmo 3 has the same name and a window; its long-range layers alone are scaled."""
    if config.get("sliding_window"):
        config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"
        config["rope_local_base_freq"] = config["rope_theta"]


def _experts(header: _Reader, config: dict[str, Any]) -> None:
    config["num_experts"] = header.integer("expert_count")
    config["num_experts_per_tok"] = header.integer("expert_used_count")
    inner = header.gguf.tensors.get("blk.0.ffn_gate_exps.weight")
    if inner is None or len(inner.shape) != 3:
        raise header.error("is missing or no stack of experts", "blk.0.ffn_gate_exps.weight")
    config["moe_intermediate_size"] = header.integer("expert_feed_forward_length", inner.shape[1])
    # Not in the header: it belongs to the family.
    config["norm_topk_prob"] = header.get("expert_weights_norm", header.prefix == "qwen3moe")
    shared = header.gguf.tensors.get("blk.0.ffn_gate_shexp.weight")
    if shared is not None:
        config["shared_expert_intermediate_size"] = shared.shape[0]


def _olmoe(header: _Reader, config: dict[str, Any]) -> None:
    _experts(header, config)
    config["intermediate_size"] = config["moe_intermediate_size"]


def _phi2(header: _Reader, config: dict[str, Any]) -> None:  # noqa: ARG001
    config.pop("attention_bias")


def _phi3(header: _Reader, config: dict[str, Any]) -> None:
    # Old converters wrote the window of models that were trained without one as 0 or not at all.
    if "rope_scaling" in config and header.get("attention.sliding_window") is None:
        config["sliding_window"] = None


_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
"""The largest models of the two families scale queries by the width of the model, which their files do not say."""


def _gemma2(header: _Reader, config: dict[str, Any]) -> None:
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if header.get(key) is not None:
            config[name] = header.get(key)
    _gemma_scale(config, _GEMMA2_27B_LAYERS)


def _gemma3(header: _Reader, config: dict[str, Any]) -> None:
    config["final_logit_softcapping"] = header.get("final_logit_softcapping")
    if header.get("rope.freq_base") is None:
        config["rope_theta"] = 1e6
    config["rope_local_base_freq"] = header.get("rope.freq_base_swa", 1e4)
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = [
            "sliding_attention" if local else "full_attention" for local in cast("list[Any]", pattern)
        ]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    _gemma_scale(config, _GEMMA3_27B_LAYERS)


def _gemma_scale(config: dict[str, Any], layers_of_largest: int) -> None:
    is_largest = config["num_hidden_layers"] == layers_of_largest
    width = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    config["query_pre_attn_scalar"] = width


def _bert(header: _Reader, config: dict[str, Any]) -> None:
    types = header.gguf.tensors.get("token_types.weight")
    # Written as a vector where there is only one.
    config["type_vocab_size"] = types.shape[0] if types is not None and len(types.shape) == 2 else 1
    if header.get("attention.causal"):
        raise header.error(f"{header.prefix}.attention.causal is set, which is not supported")


_GELU = "gelu_pytorch_tanh"
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", "llama", add=_llama, has_experts=True),
    "mistral3": _Family("MistralForCausalLM", "mistral", add=_mistral, has_experts=True),
    "granite": _Family("GraniteForCausalLM", "granite", add=_granite),
    "granitemoe": _Family("GraniteMoeForCausalLM", "granitemoe", add=_granitemoe, has_experts=True),
    "gpt-oss": _Family("GptOssForCausalLM", "gpt_oss", add=_gpt_oss, has_experts=True),
    "smollm3": _Family("SmolLM3ForCausalLM", "smollm3"),
    "olmo2": _Family("Olmo2ForCausalLM", "olmo2", add=_olmo2),
    "qwen2": _Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Family("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": _Family("Qwen2MoeForCausalLM", "qwen2_moe", add=_experts, has_experts=True),
    "qwen3moe": _Family("Qwen3MoeForCausalLM", "qwen3_moe", add=_experts, has_experts=True),
    "olmoe": _Family("OlmoeForCausalLM", "olmoe", add=_olmoe, has_experts=True),
    "phi2": _Family("PhiForCausalLM", "phi", "gelu_new", add=_phi2),
    "phi3": _Family("Phi3ForCausalLM", "phi3", add=_phi3),
    "gemma": _Family("GemmaForCausalLM", "gemma", _GELU),
    "gemma2": _Family("Gemma2ForCausalLM", "gemma2", _GELU, add=_gemma2),
    "gemma3": _Family("Gemma3ForCausalLM", "gemma3_text", _GELU, add=_gemma3),
    "bert": _Family("BertModel", "bert", "gelu", add=_bert),
}
"""By ``general.architecture``."""
ARCHITECTURES: Mapping[str, str] = {name: family.architecture for name, family in _FAMILIES.items()}
"""GGUF's name to transformers' class."""

"""From what a model folder or a GGUF file says to a checked ``ModelConfig``.

A GGUF header is first put into the words of ``config.json`` (``gguf_config.py``), so that one piece of code checks both
and ``hf_overrides`` mean the same for both. Knows no torch and no model class; runs no code of the model: who may do so
(``trust_remote_code``) hands in a function that does. Every complaint names the file and the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from octavo.checkpoint.code import FIELD, read_code
from octavo.checkpoint.families import ARCHITECTURES, BOTH_WAYS, DEFAULTS, language_model, own_fields
from octavo.checkpoint.files import read_json_object
from octavo.checkpoint.foreign import foreign_defaults, foreign_fields, has_unknown_layers
from octavo.checkpoint.gguf_config import CONFIG_STRINGS, gguf_to_hf_config
from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.locate import LocatedModel
from octavo.checkpoint.mla import expand_mla, read_mla
from octavo.checkpoint.moe import read_moe
from octavo.checkpoint.rope import read_layer_ropes, read_rope
from octavo.checkpoint.values import Fields
from octavo.config.model import CheckpointCode, ModelConfig
from octavo.errors import CheckpointError, ConfigError, ModelNotFoundError

_HAS_SINKS = frozenset({"gpt_oss"})
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_OLDER_ROPE = ("rope_scaling", "rope_theta", "partial_rotary_factor")
_DTYPES = ("float32", "float16", "bfloat16")
_GENERATION_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty")
MAX_DIMENSION = 1 << 24
MAX_LAYERS = 4096
RunCode = Callable[[CheckpointCode, Mapping[str, Any]], "dict[str, Any] | None"]
"""From the fields of config.json to those that the checkpoint's own config class makes of them; None when the model
runs without the checkpoint's code."""


def read_model_config(
    located: LocatedModel, hf_overrides: Mapping[str, Any] | None = None, run_code: RunCode | None = None
) -> ModelConfig:
    """Read and check the config of a located model.

    Args:
        located: From ``locate_model``.
        hf_overrides: Fields put over those of config.json (or of the GGUF header in the same words); one level of
            nested objects is merged, not replaced.
        run_code: Called where the checkpoint brings code; None where that may not run.

    Raises:
        ModelNotFoundError: The folder has no config.json.
        CheckpointError: A field is missing, of the wrong type or out of range; names the file and the field.
        ConfigError: An override does not say which of several values it means.
    """
    path = Path(located.path)
    generation: dict[str, Any] = {}
    generation_file = path / "generation_config.json"
    if path.is_dir():
        file = path / "config.json"
        if not file.exists():
            raise ModelNotFoundError(f"{path} has no config.json, so it is no model folder", param="model")
        config = read_json_object(file)
        if generation_file.exists():
            generation = read_json_object(generation_file)
    else:
        file = generation_file = path
        with GGUFFile(path, strings=CONFIG_STRINGS) as gguf:
            config, generation = gguf_to_hf_config(gguf)
    code = read_code(path, config)
    config.pop(FIELD, None)
    if code is not None and run_code is not None and (stated := run_code(code, config)) is not None:
        code, config = replace(code, is_trusted=True), stated
    _override(config, hf_overrides or {})
    try:
        made = _model_config(config, generation, str(file), str(generation_file))
    except CheckpointError as exc:
        if code is None or code.is_trusted or config.get("model_type") in DEFAULTS:
            raise
        hint = "the checkpoint's own config class may know better, but its code runs only with --trust-remote-code"
        raise CheckpointError(exc.file, f"{exc.reason} ({hint})") from exc
    return made if code is None else replace(made, code=code)


def _override(config: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Put fields over those of ``config``. What older files call RoPE's settings counts in newer ones too."""
    for name, value in overrides.items():
        config[name] = _merged(config.get(name), value)
    older = [name for name in _OLDER_ROPE if name in overrides]
    rope = config.get("rope_parameters")
    if not older or "rope_parameters" in overrides or not isinstance(rope, dict):
        return
    if any(isinstance(each, dict) for each in cast("dict[str, Any]", rope).values()):
        raise ConfigError(
            f"hf_overrides sets {older[0]}, but this model has rope_parameters for each kind of layer: override those",
            param="hf_overrides",
        )
    for name in older:
        value = config.pop(name)
        rope = _merged(rope, value if name == "rope_scaling" else {name: value})
    config["rope_parameters"] = rope


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**cast("dict[str, Any]", old), **cast("dict[str, Any]", new)}
    return new


def _model_config(config: dict[str, Any], generation: dict[str, Any], file: str, generation_file: str) -> ModelConfig:
    if str(config.get("model_type")) in BOTH_WAYS:
        reason = "attends to its prompt in both directions, which is not supported"
        raise CheckpointError(file, f"model_type {config['model_type']!r} {reason}")
    is_half = "encoder_layers" in config and "num_hidden_layers" not in config  # one half of such a model
    if config.get("is_encoder_decoder") is True or is_half:
        raise CheckpointError(
            file, "is_encoder_decoder is true: a model with an encoder and a decoder is not supported"
        )
    config, wrapper = language_model(config)
    config = expand_mla(config, file)
    model_type = str(config.get("model_type")) if isinstance(config.get("model_type"), str) else ""
    is_foreign = model_type not in DEFAULTS
    f = Fields(foreign_fields(config) if is_foreign else own_fields(config, model_type), file)
    architecture = _architecture(f, model_type)
    f.is_foreign = is_foreign
    f.defaults = foreign_defaults(config) if is_foreign else DEFAULTS[model_type]

    vocab_size = f.integer("vocab_size", 1, MAX_DIMENSION)
    hidden_size = f.integer("hidden_size", 1, MAX_DIMENSION)
    num_layers = f.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads = f.integer("num_attention_heads", 1, MAX_DIMENSION)
    head_dim = f.optional_integer("head_dim", 1, MAX_DIMENSION)
    if head_dim is None:
        if hidden_size % num_heads and not f.is_foreign:  # whoever has such a model knows its heads
            raise f.error("hidden_size", f"is {hidden_size}, not a multiple of num_attention_heads ({num_heads})")
        head_dim = max(1, hidden_size // num_heads)
    num_kv_heads = f.optional_integer("num_key_value_heads", 1, MAX_DIMENSION) or num_heads
    if num_heads % num_kv_heads:
        raise f.error("num_key_value_heads", f"is {num_kv_heads}, but must divide num_attention_heads ({num_heads})")
    max_positions = f.integer("max_position_embeddings", 1, 2**31 - 1)
    rope, local = (read_rope(f, head_dim, max_positions, kind) for kind in ("full_attention", "sliding_attention"))
    window, is_local = _local_layers(f, num_layers)
    # A window as long as the longest text hides nothing.
    hides = window is not None and window < rope.max_length(max_positions) and any(is_local)
    windows = tuple(window if local else None for local in is_local) if hides else ()
    quantization = f.mapping("quantization_config")
    g = Fields(generation, generation_file)
    eos = dict.fromkeys([*f.token_ids("eos_token_id", vocab_size), *g.token_ids("eos_token_id", vocab_size)])
    bos = [*f.token_ids("bos_token_id", vocab_size), *g.token_ids("bos_token_id", vocab_size)]
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=f.integer("intermediate_size", 1, MAX_DIMENSION),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=_norm_eps(f),
            rope=rope,
            hidden_act=_hidden_act(f, model_type),
            tie_word_embeddings=f.boolean("tie_word_embeddings", False),
            attention_bias=f.boolean("attention_bias", False),
            mlp_bias=f.boolean("mlp_bias", False),
            sliding_window=next((w for w in windows if w is not None), None),
            layer_windows=windows,
            layer_ropes=read_layer_ropes(f, rope, local, is_local, num_layers),
            attention_scale=_attention_scale(f),
            attention_softcap=_optional_positive(f, "attn_logit_softcapping"),
            has_sinks=model_type in _HAS_SINKS,
            logit_softcap=_optional_positive(f, "final_logit_softcapping"),
            embedding_scale=f.number("embedding_multiplier", 1.0, low=0.0),
            residual_scale=f.number("residual_multiplier", 1.0, low=0.0),
            logit_scale=1.0 / f.number("logits_scaling", 1.0, low=1e-6),
            text_half_of=wrapper,
            moe=read_moe(f, model_type, num_layers),
            mla=read_mla(f, model_type),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(eos),
            dtype=_dtype(f),
            quantization=quantization,
            generation_defaults=_generation_defaults(g),
            hf=config,
        )
    except ConfigError as exc:
        raise CheckpointError(file, exc.message) from exc


def _architecture(f: Fields, model_type: str) -> str:
    names = f.values.get("architectures")
    if isinstance(names, list) and names:
        first = cast("list[Any]", names)[0]
        if isinstance(first, str) and first.isidentifier():
            return first
        raise f.error("architectures", f"names {first!r:.100}, which is no class name")
    if names is not None and not isinstance(names, list):
        raise f.error("architectures", f"must be a list of class names, not {names!r:.100}")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise f.error("architectures", "is missing, so the kind of model is not known")


def _dtype(f: Fields) -> str:
    name = "dtype" if f.values.get("dtype") is not None else "torch_dtype"
    value = f.string(name, "float32").removeprefix("torch.")
    if value not in _DTYPES:
        raise f.error(name, f"is {value!r:.100}, but must be one of {', '.join(_DTYPES)}")
    return value


def _norm_eps(f: Fields) -> float:
    name = next((n for n in _EPSILONS if f.get(n) is not None), _EPSILONS[0])
    return f.number(name, 1e-6, low=0.0, high=1.0)


def _hidden_act(f: Fields, model_type: str) -> str:
    name = f.string("hidden_activation", f.string("hidden_act", "silu"))
    # The first files of Gemma say so and mean the approximation.
    return "gelu_pytorch_tanh" if model_type == "gemma" and name == "gelu" else name


def _attention_scale(f: Fields) -> float | None:
    if f.get("query_pre_attn_scalar") is not None:
        return f.number("query_pre_attn_scalar", None, low=1e-6) ** -0.5
    return _optional_positive(f, "attention_multiplier")


def _optional_positive(f: Fields, name: str) -> float | None:
    return None if f.get(name) is None else f.number(name, None, low=1e-6)


def _local_layers(f: Fields, num_layers: int) -> tuple[int | None, list[bool]]:
    """The window, and [num_layers] which layers have it; none where there is no window."""
    if f.get("use_bidirectional_attention"):
        raise f.error("use_bidirectional_attention", "is set, but only attention to earlier tokens is supported")
    # Some write 0 for none.
    window = f.optional_integer("sliding_window", 0, 2**31 - 1) or None
    if f.is_foreign and has_unknown_layers(f.values):
        return None, [False] * num_layers  # whoever has such a model knows what they are
    if f.values.get("layer_types") is not None:
        is_local = _stated_kinds(f, num_layers)
        if window is None and any(is_local):
            raise f.error("sliding_window", "is missing, but layer_types has sliding_attention layers")
    else:
        is_local = _implied_kinds(f, num_layers)
    return window, is_local if window is not None else [False] * num_layers


def _stated_kinds(f: Fields, num_layers: int) -> list[bool]:
    """[num_layers] whether a layer has the window, by name."""
    kinds = f.values["layer_types"]
    if not isinstance(kinds, list) or len(cast("list[Any]", kinds)) != num_layers:
        raise f.error("layer_types", f"must be a list of num_hidden_layers ({num_layers}) names")
    for kind in cast("list[Any]", kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise f.error("layer_types", f"holds {kind!r:.100}; known are full_attention and sliding_attention")
    return [kind == "sliding_attention" for kind in cast("list[Any]", kinds)]


def _implied_kinds(f: Fields, num_layers: int) -> list[bool]:
    """[num_layers] whether a layer has the window, by the rules of before ``layer_types``."""
    is_asked = f.get("use_sliding_window") is None or f.boolean("use_sliding_window", False)
    if not is_asked:
        return [False] * num_layers
    first = f.optional_integer("max_window_layers", 0, MAX_DIMENSION) or 0
    pattern = f.optional_integer("sliding_window_pattern", 1, MAX_DIMENSION)
    return [index >= first and (pattern is None or (index + 1) % pattern != 0) for index in range(num_layers)]


def _generation_defaults(g: Fields) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for name in _GENERATION_FIELDS:
        if g.values.get(name) is not None:
            defaults[name] = g.number(name, 0.0, low=0.0, high=1e6)
    top_k = g.optional_integer("top_k", -1, MAX_DIMENSION)
    if top_k is not None:
        defaults["top_k"] = top_k
    max_tokens = g.optional_integer("max_new_tokens", 1, 2**31 - 1)
    if max_tokens is not None:
        defaults["max_tokens"] = max_tokens
    return defaults

"""Mixtures of experts in a config: each family's words for them, checked and brought to one form. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from octavo.checkpoint.values import Fields
from octavo.config.moe import MoeConfig

_MAX = 1 << 24


def read_moe(f: Fields, model_type: str, num_layers: int) -> MoeConfig | None:
    """The mixtures of experts of a model; None for families without, and where no layer has one.

    Args:
        f: All fields of config.json.
        model_type: Its ``model_type``.
        num_layers: Of the model.

    Raises:
        CheckpointError: A field is missing or out of range.
        ConfigError: The fields contradict one another.
    """
    reader = _READERS.get(model_type)
    moe = None if reader is None else reader(f, num_layers)
    return moe if moe is not None and any(moe.layers) else None


def _num_experts(f: Fields) -> int:
    """Under whichever of its names; newer versions of a library write another one."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    for values in (f.values, f.defaults):
        for name in names:
            if values.get(name) is not None:
                return f.integer(name, 1, _MAX)
    raise f.error("num_experts", "is missing (num_local_experts and n_routed_experts mean the same)")


def _inner(f: Fields) -> int:
    return f.integer("moe_intermediate_size", 1, _MAX)


def _per_token(f: Fields) -> int:
    return f.integer("num_experts_per_tok", 1, _MAX)


def _mixtral(f: Fields, num_layers: int) -> MoeConfig:
    size = f.integer("intermediate_size", 1, _MAX)
    return MoeConfig(_num_experts(f), _per_token(f), size, (True,) * num_layers, is_normalised=True)


def _phimoe(f: Fields, num_layers: int) -> MoeConfig:
    top_k = _per_token(f)
    if top_k != 2:
        raise f.error("num_experts_per_tok", f"is {top_k}, but this family's router chooses 2")
    return MoeConfig(
        _num_experts(f),
        top_k,
        f.integer("intermediate_size", 1, _MAX),
        (True,) * num_layers,
        scoring="sparsemixer",
        jitter=f.number("router_jitter_noise", 0.01, low=0.0, high=1.0),
    )


def _qwen(f: Fields, num_layers: int) -> MoeConfig:
    shared = f.optional_integer("shared_expert_intermediate_size", 1, _MAX) or 0
    return MoeConfig(
        _num_experts(f),
        _per_token(f),
        _inner(f),
        _sparse_layers(f, num_layers),
        is_normalised=f.boolean("norm_topk_prob", False),
        shared_size=shared,
        has_shared_gate=shared > 0,
    )


def _sparse_layers(f: Fields, num_layers: int) -> tuple[bool, ...]:
    step = f.optional_integer("decoder_sparse_step", 1, _MAX) or 1
    value: Any = f.get("mlp_only_layers")
    dense = [] if value is None else cast("list[Any]", value)
    if not isinstance(value, list | None) or not all(type(each) is int for each in dense):
        raise f.error("mlp_only_layers", "must be a list of layer numbers")
    return tuple((index + 1) % step == 0 and index not in dense for index in range(num_layers))


def _olmoe(f: Fields, num_layers: int) -> MoeConfig:
    if f.get("clip_qkv") is not None:
        raise f.error("clip_qkv", "is set, which is not supported; it must be null")
    return MoeConfig(
        _num_experts(f),
        _per_token(f),
        f.integer("intermediate_size", 1, _MAX),
        (True,) * num_layers,
        is_normalised=f.boolean("norm_topk_prob", False),
    )


def _gpt_oss(f: Fields, num_layers: int) -> MoeConfig:
    return MoeConfig(
        _num_experts(f),
        _per_token(f),
        f.integer("intermediate_size", 1, _MAX),
        (True,) * num_layers,
        is_normalised=True,
        has_router_bias=True,
        has_expert_bias=True,
        swiglu=(f.number("swiglu_alpha", 1.702, low=0.0), f.number("swiglu_limit", 7.0, low=1e-6)),
    )


def _deepseek_layers(f: Fields, num_layers: int) -> tuple[bool, ...]:
    first = f.optional_integer("first_k_dense_replace", 0, _MAX) or 0
    step = f.optional_integer("moe_layer_freq", 1, _MAX) or 1
    return tuple(index >= first and index % step == 0 for index in range(num_layers))


def _shared(f: Fields) -> int:
    return _inner(f) * (f.optional_integer("n_shared_experts", 0, _MAX) or 0)


def _deepseek_v2(f: Fields, num_layers: int) -> MoeConfig:
    method = f.string("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise f.error("topk_method", f"is {method!r:.60}, but must be greedy or group_limited_greedy")
    if f.boolean("norm_topk_prob", False):
        raise f.error("norm_topk_prob", "is true, which implementations of this family understand in different ways")
    is_grouped = method == "group_limited_greedy"
    return MoeConfig(
        _num_experts(f),
        _per_token(f),
        _inner(f),
        _deepseek_layers(f, num_layers),
        scale=f.number("routed_scaling_factor", 1.0, low=0.0),
        num_groups=f.integer("n_group", 1, _MAX) if is_grouped else 1,
        top_groups=f.integer("topk_group", 1, _MAX) if is_grouped else 1,
        is_wide_router=True,
        shared_size=_shared(f),
    )


def _deepseek_v3(f: Fields, num_layers: int) -> MoeConfig:
    for name, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if f.string(name, only) != only:
            raise f.error(name, f"is {f.get(name)!r:.60}, but only {only} is supported for this family")
    return MoeConfig(
        _num_experts(f),
        _per_token(f),
        _inner(f),
        _deepseek_layers(f, num_layers),
        scoring="sigmoid",
        is_normalised=f.boolean("norm_topk_prob", True),
        scale=f.number("routed_scaling_factor", 2.5, low=0.0),
        num_groups=f.integer("n_group", 1, _MAX),
        top_groups=f.integer("topk_group", 1, _MAX),
        is_group_of_two=True,
        has_correction=True,
        is_wide_router=True,
        shared_size=_shared(f),
    )


_READERS: Mapping[str, Callable[[Fields, int], MoeConfig]] = {
    "mixtral": _mixtral,
    "granitemoe": _mixtral,
    "phimoe": _phimoe,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "qwen3_omni_moe_text": _qwen,
    "qwen3_vl_moe_text": _qwen,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
"""By ``model_type``."""

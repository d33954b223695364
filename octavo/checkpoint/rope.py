"""Rotary embedding settings: the spellings of config.json, checked and brought to one form.

Read are ``rope_parameters`` (transformers 5; possibly one object per kind of layer), and ``rope_theta`` with
``rope_scaling`` (before). The kind stands under
``rope_type`` or, older, ``type``. Computes nothing: the formulas are in ``octavo/layers/rotary.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from octavo.checkpoint.values import Fields
from octavo.config.model import RopeConfig

_ALIASES = {"su": "longrope", "mrope": "default"}
"""``mrope``: positions in pictures; those of text are the same in all its parts."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(f: Fields, head_dim: int, max_positions: int, layer_kind: str = "full_attention") -> RopeConfig:
    """Check the rotary settings of a config.

    Args:
        f: All fields of config.json.
        head_dim: Of one attention head.
        max_positions: ``max_position_embeddings``: the original length where the scaling does not state one.
        layer_kind: ``full_attention`` or ``sliding_attention``: some models rotate these differently.

    Raises:
        CheckpointError: A field is missing or out of range.
    """
    name = "rope_parameters" if f.values.get("rope_parameters") is not None else "rope_scaling"
    raw = dict(f.mapping(name) or {})
    where = f"{name}."
    base_name = "rope_theta"
    is_local = layer_kind == "sliding_attention" and f.get("rope_local_base_freq") is not None
    if any(isinstance(value, dict) for value in raw.values()):
        raw = dict(Fields(raw, f.file, where).mapping(layer_kind) or {})
        where = f"{name}.{layer_kind}."
    elif is_local:
        raw = {}  # scaling is for the layers that see far
    if is_local:
        base_name = "rope_local_base_freq"
    s = Fields(raw, f.file, where)
    if raw.get("rope_theta") is not None:
        theta = s.number("rope_theta", None, low=1e-6)
    else:
        theta = f.number(base_name, 10000.0, low=1e-6)
    partial_from = s if raw.get("partial_rotary_factor") is not None else f
    partial = partial_from.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise f.error("head_dim", f"gives {rotary_dim} rotated values, but must give an even number of at least 2")
    kind = s.string("rope_type", s.string("type", "default"))
    kind = _ALIASES.get(kind, kind)
    if kind not in ROPE_TYPES and f.is_foreign:
        return RopeConfig(theta, {**raw, "rope_type": kind}, partial)  # whoever has such a model knows what it is
    if kind not in ROPE_TYPES:
        raise s.error("rope_type", f"is {kind!r:.60}, but must be one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    return RopeConfig(theta, _scaling(s, f, kind, rotary_dim, max_positions), partial)


def read_layer_ropes(
    f: Fields, rope: RopeConfig, local: RopeConfig, is_local: Sequence[bool], num_layers: int
) -> tuple[RopeConfig | None, ...]:
    """[num_layers] rotary embedding of each layer, None for one without positions; empty when all have ``rope``.

    Args:
        f: All fields of config.json.
        rope: Of layers that see everything.
        local: Of layers with a window.
        is_local: [num_layers] which have a window, even one that is longer than all texts.
        num_layers: Of the model.

    Raises:
        CheckpointError: A field is out of range.
    """
    ropes: list[RopeConfig | None] = [local if each else rope for each in is_local]
    rotated = f.values.get("no_rope_layers")
    interval = f.optional_integer("no_rope_layer_interval", 1, 1 << 24)
    if rotated is not None:
        if not isinstance(rotated, list) or len(cast("list[Any]", rotated)) not in (0, num_layers):
            raise f.error("no_rope_layers", f"must be a list of num_hidden_layers ({num_layers}) zeros and ones")
        if any(value not in (0, 1) for value in cast("list[Any]", rotated)):
            raise f.error("no_rope_layers", "must hold zeros (layers without positions) and ones only")
    if not rotated and interval is not None:
        rotated = [int((index + 1) % interval != 0) for index in range(num_layers)]
    for index, is_rotated in enumerate(cast("list[int]", rotated or [])):
        if not is_rotated:
            ropes[index] = None
    return () if all(each == rope for each in ropes) else tuple(ropes)


def _scaling(s: Fields, f: Fields, kind: str, rotary_dim: int, max_positions: int) -> dict[str, Any]:
    scaling = {k: v for k, v in s.values.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    scaling["rope_type"] = kind
    own = s if s.values.get("original_max_position_embeddings") is not None else f
    original = own.optional_integer("original_max_position_embeddings", 1, 2**31 - 1)
    if kind == "longrope":
        scaling["short_factor"] = s.numbers("short_factor", rotary_dim // 2, low=1e-6)
        scaling["long_factor"] = s.numbers("long_factor", rotary_dim // 2, low=1e-6)
    else:
        scaling["factor"] = s.number("factor", None, low=1e-6)
    if kind == "llama3":
        low = scaling["low_freq_factor"] = s.number("low_freq_factor", None, low=1e-6)
        high = scaling["high_freq_factor"] = s.number("high_freq_factor", None, low=1e-6)
        if high <= low:
            raise s.error("high_freq_factor", f"is {high:g}, but must be greater than low_freq_factor ({low:g})")
        if original is None:
            raise s.error("original_max_position_embeddings", "is missing")
    if kind == "yarn":
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[name] = s.number(name, default, low=1e-6)
    for name in ("attention_factor", "mscale", "mscale_all_dim", "short_mscale", "long_mscale"):
        if s.values.get(name) is not None:
            scaling[name] = s.number(name, None, low=0.0)
    if original is None and kind == "linear" and f.get("counts_scaled_positions"):
        original = max(1, int(max_positions / scaling["factor"]))
    scaling["original_max_position_embeddings"] = original or max_positions
    return scaling


def scaling_from_factors(factors: Sequence[float], theta: float, max_positions: int) -> dict[str, Any]:
    """Hugging Face's words for a list of divisors of the rotary frequencies (GGUF's ``rope_freqs.weight``).

    Llama 3's rule leaves its mark on the list: 1 for short wavelengths, one constant for long ones, and a known blend
    between. When the rule with the constants of all released Llama 3.x models gives the list to float32 precision, it
    is named; any other list becomes ``longrope`` with that list, which divides the same way.

    Args:
        factors: One divisor for each pair of rotated values.
        theta: Base of the frequencies.
        max_positions: Context length of the model.

    Returns:
        A ``rope_scaling`` object; empty when every divisor is 1.
    """
    if all(f == 1.0 for f in factors):
        return {}
    llama3 = {"rope_type": "llama3", "factor": float(max(factors)), **_LLAMA3}
    expected = _llama3_factors(llama3, len(factors), theta)
    if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(factors, expected, strict=True)):
        return llama3
    values = [float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
    }


def _llama3_factors(scaling: dict[str, Any], count: int, theta: float) -> list[float]:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    result: list[float] = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (i / count)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1.0 / ((1 - smooth) / factor + smooth))
    return result

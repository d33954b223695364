"""Rotary embedding settings: the spellings of config.json, checked and brought to one form.

Read are ``rope_parameters`` (transformers 5), and ``rope_theta`` with ``rope_scaling`` (before). The kind stands under
``rope_type`` or, older, ``type``. Computes nothing: the formulas are in ``octavo/layers/rotary.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from octavo.checkpoint.values import Fields
from octavo.config.model import RopeConfig

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(f: Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """Check the rotary settings of a config.

    Args:
        f: All fields of config.json.
        head_dim: Of one attention head.
        max_positions: ``max_position_embeddings``: the original length where the scaling does not state one.

    Raises:
        CheckpointError: A field is missing or out of range.
    """
    name = "rope_parameters" if f.values.get("rope_parameters") is not None else "rope_scaling"
    raw = dict(f.mapping(name) or {})
    if any(isinstance(value, dict) for value in raw.values()):
        raise f.error(name, "differs between kinds of layers, which is not supported")
    s = Fields(raw, f.file, f"{name}.")
    theta_from = s if raw.get("rope_theta") is not None else f
    theta = theta_from.number("rope_theta", 10000.0, low=1e-6)
    partial_from = s if raw.get("partial_rotary_factor") is not None else f
    partial = partial_from.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise f.error("head_dim", f"gives {rotary_dim} rotated values, but must give an even number of at least 2")
    kind = s.string("rope_type", s.string("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in ROPE_TYPES:
        raise s.error("rope_type", f"is {kind!r:.60}, but must be one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    return RopeConfig(theta, _scaling(s, f, kind, rotary_dim, max_positions), partial)


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
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if s.values.get(name) is not None:
            scaling[name] = s.number(name, None, low=0.0)
    if kind != "linear":
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

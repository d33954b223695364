"""Rotary position embedding: the frequencies of each RoPE type, and the table of rotations by position.

Types: default; linear (position interpolation); llama3 (frequency bands, Llama 3.1); yarn (Peng et al., "YaRN", 2023);
longrope (Ding et al., "LongRoPE", 2024), whose long factors are used when the engine serves sequences beyond the
trained length, else its short ones; dynamic, whose rotations equal the default ones up to the trained length and which
is therefore refused beyond it. Layers without positions get a table of width 0.
The table is computed once. Layers get it with the positions of a step: kernels that rotate while they do something else
read its rows themselves, others share rows that are gathered once a step. See ``kernels/rope.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.config.model import RopeConfig
from octavo.errors import ConfigError
from octavo.kernels.rope import interleave_order, rotate

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


class Rotary:
    """``[max_positions, R / 2]`` complex64 rotations of one RoPE configuration."""

    def __init__(
        self, rope: RopeConfig | None, head_dim: int, max_positions: int, trained_positions: int, device: torch.device
    ) -> None:
        """Compute the table.

        Args:
            rope: As the model's config says; None for layers without positions.
            head_dim: Size of a head; ``partial_rotary_factor`` of it rotates.
            max_positions: Rows of the table: the longest sequence that the engine serves.
            trained_positions: The model's ``max_position_embeddings``.
            device: Where the table lives.

        Raises:
            ConfigError: The type is unknown, a parameter is missing, or ``dynamic`` is asked beyond its length.
        """
        self.rotary_dim = 0 if rope is None else int(head_dim * rope.partial_rotary_factor) // 2 * 2
        self.head_order = interleave_order(head_dim, self.rotary_dim)
        """[D] where each stored dimension of a head comes from in the checkpoint."""
        frequencies, magnitude = torch.empty(0), 1.0
        if rope is not None:
            frequencies, magnitude = rope_frequencies(rope, self.rotary_dim, max_positions, trained_positions)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self._table = torch.polar(torch.full_like(angles, magnitude), angles).to(device)
        scales = None if rope is None else _query_scales(rope, max_positions, trained_positions)
        self._query_scales = None if scales is None else scales.to(device)

    def forward(self, positions: Tensor) -> Rotations:
        """The rotations of a step whose tokens stand at ``[T]`` int64 positions."""
        return Rotations(self._table, positions, self._query_scales)


class Rotations:
    """The rotation of each token of one step, for all layers that share a table."""

    def __init__(self, table: Tensor, positions: Tensor, query_scales: Tensor | None = None) -> None:
        self.table = table
        """[max_positions, R / 2] complex64."""
        self.positions = positions
        """[T] int64."""
        self._rows: Tensor | None = None
        self._scales = query_scales

    def query_scales(self) -> Tensor | None:
        """``[T, 1]`` float32 by which queries are longer at their positions; None where they never are."""
        return None if self._scales is None else self._scales[self.positions, None]

    def rows(self) -> Tensor:
        """``[T, R / 2]`` complex64; gathered at the first call."""
        if self._rows is None:
            self._rows = self.table[self.positions]
        return self._rows


def rotate_heads(heads: Tensor, rotation: Tensor) -> None:
    """Rotate ``heads [T, H, D]`` in place by ``rotation [T, R / 2]``; their rows must be in ``Rotary.head_order``."""
    rotate(heads, rotation)


def head_order(order: Tensor, *, rotated: int, plain: int) -> Tensor:
    """Row order of a fused projection: ``rotated`` heads in ``order``, then ``plain`` heads as they are."""
    size = len(order)
    starts = torch.arange(rotated)[:, None] * size
    return torch.cat(((starts + order).flatten(), torch.arange(rotated * size, (rotated + plain) * size)))


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_positions: int, trained_positions: int
) -> tuple[Tensor, float]:
    """Angular frequencies ``[rotary_dim / 2]`` float32 in radians per token, and the magnitude of the rotations.

    Raises:
        ConfigError: See ``Rotary``.
    """
    scaling = rope.scaling
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    base = 1.0 / rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if kind == "default":
        return base, 1.0
    if kind == "linear":
        return base / _number(scaling, kind, "factor"), 1.0
    if kind == "llama3":
        return _llama3(base, scaling), 1.0
    if kind == "yarn":
        return _yarn(base, scaling, rope.theta, rotary_dim, trained_positions)
    if kind == "longrope":
        return _longrope(base, scaling, max_positions, trained_positions)
    if kind == "dynamic":
        if max_positions > trained_positions:
            raise ConfigError(
                f"rope type 'dynamic' changes its frequencies beyond {trained_positions} tokens, which would make "
                f"cached keys wrong; lower max_model_len from {max_positions} to at most that",
                param="max_model_len",
            )
        return base, 1.0
    raise ConfigError(
        f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_TYPES)}. "
        "hf_overrides can replace rope_scaling.",
        param="rope_scaling",
    )


def _number(scaling: Mapping[str, Any], kind: str, name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(
            f"rope type {kind!r} needs a positive number {name!r}, but it is {value!r}", param="rope_scaling"
        )
    return float(value)


def _llama3(base: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Slow rotations are slowed by ``factor``, fast ones kept, those between mixed."""
    factor = _number(scaling, "llama3", "factor")
    low = _number(scaling, "llama3", "low_freq_factor")
    high = _number(scaling, "llama3", "high_freq_factor")
    trained = _number(scaling, "llama3", "original_max_position_embeddings")
    if high <= low:
        raise ConfigError("rope type 'llama3' needs high_freq_factor > low_freq_factor", param="rope_scaling")
    turns = trained * base / (2 * math.pi)  # full rotations within the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (kept + (1 - kept) / factor)


def _yarn(
    base: Tensor, scaling: Mapping[str, Any], theta: float, rotary_dim: int, trained_positions: int
) -> tuple[Tensor, float]:
    """A ramp over dimensions from kept to interpolated frequencies, and a softer temperature of the scores."""
    trained = _number(scaling, "yarn", "original_max_position_embeddings", float(trained_positions))
    factor = _number(scaling, "yarn", "factor", max(1.0, trained_positions / trained))

    def dimension(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension(_number(scaling, "yarn", "beta_fast", 32.0))
    last = dimension(_number(scaling, "yarn", "beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    interpolated = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)).clamp(0, 1)
    frequencies = base * (1 - interpolated) + base / factor * interpolated

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return frequencies, _number(scaling, "yarn", "attention_factor")
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return frequencies, temperature(mscale) / temperature(mscale_all_dim)
    return frequencies, temperature(1.0)


def _query_scales(rope: RopeConfig, max_positions: int, trained_positions: int) -> Tensor | None:
    """``[max_positions]`` float32: queries grow with the logarithm of how often the first length is passed, as in
    Llama 4 and Ministral 3, so that attention stays sharp over long texts. None where all are 1."""
    if rope.scaling.get("llama_4_scaling_beta") is None:
        return None
    beta = _number(rope.scaling, "yarn", "llama_4_scaling_beta")
    original = _number(rope.scaling, "yarn", "original_max_position_embeddings", float(trained_positions))
    if max_positions <= original:
        return None
    return 1 + beta * torch.log(1 + torch.floor(torch.arange(max_positions, dtype=torch.float32) / original))


def _longrope(
    base: Tensor, scaling: Mapping[str, Any], max_positions: int, trained_positions: int
) -> tuple[Tensor, float]:
    """One divisor per frequency: from one list up to the length of the first training, from the other beyond.

    The choice holds for an engine, not for a request: keys that are in the cache cannot be rotated anew when a sequence
    grows past that length.
    """
    original = _number(scaling, "longrope", "original_max_position_embeddings", float(trained_positions))
    length = "long" if max_positions > original else "short"
    name = f"{length}_factor"
    divisors = scaling.get(name)
    if not isinstance(divisors, list) or len(divisors) != len(base):
        raise ConfigError(f"rope type 'longrope' needs a list {name!r} of {len(base)} numbers", param="rope_scaling")
    frequencies = base / torch.tensor(divisors, dtype=torch.float32)
    if scaling.get(f"{length}_mscale") is not None:
        return frequencies, _number(scaling, "longrope", f"{length}_mscale")
    if scaling.get("attention_factor") is not None:
        return frequencies, _number(scaling, "longrope", "attention_factor")
    factor = _number(scaling, "longrope", "factor", trained_positions / original)
    return frequencies, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

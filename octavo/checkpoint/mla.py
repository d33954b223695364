"""Multi-head latent attention in a config, and what it means for the fields that all families share.

Keys and values are expanded to full heads before they are cached, so a head's size is that of its two parts together,
and there are as many KV heads as query heads. Computes nothing with tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octavo.checkpoint.values import Fields
from octavo.config.mla import MlaConfig

_MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
_MAX = 1 << 24


def read_mla(f: Fields, model_type: str) -> MlaConfig | None:
    """The sizes of latent attention; None for families without.

    Raises:
        CheckpointError: A field is missing or out of range.
    """
    if model_type not in _MODEL_TYPES:
        return None
    mla = MlaConfig(
        query_rank=f.optional_integer("q_lora_rank", 1, _MAX),
        kv_rank=f.integer("kv_lora_rank", 1, _MAX),
        plain_dim=f.integer("qk_nope_head_dim", 1, _MAX),
        rotary_dim=f.integer("qk_rope_head_dim", 2, _MAX),
        value_dim=f.integer("v_head_dim", 1, _MAX),
        is_interleaved=f.boolean("rope_interleave", True),
    )
    if mla.rotary_dim % 2:
        raise f.error("qk_rope_head_dim", f"is {mla.rotary_dim}, but must be even")
    if mla.value_dim > mla.plain_dim + mla.rotary_dim:
        raise f.error("v_head_dim", f"is {mla.value_dim}, more than a key head has ({mla.plain_dim + mla.rotary_dim})")
    return mla


def expand_mla(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """``config`` with ``head_dim``, ``num_key_value_heads``, ``partial_rotary_factor`` and ``attention_multiplier`` as
    they are once keys and values are expanded; unchanged for other families.

    Raises:
        CheckpointError: See ``read_mla``.
    """
    f = Fields(config, file)
    mla = read_mla(f, str(config.get("model_type")))
    if mla is None:
        return dict(config)
    head_dim = mla.plain_dim + mla.rotary_dim
    rope = f.mapping("rope_parameters") or f.mapping("rope_scaling") or {}
    s = Fields(rope, file, "rope_scaling.")
    scale = head_dim**-0.5
    if s.string("rope_type", s.string("type", "default")) != "default":
        # YaRN's temperature of the scores (``mscale``) is part of the scale here, since it concerns all of a head.
        weight, factor = s.number("mscale_all_dim", 0.0, low=0.0), s.number("factor", 1.0, low=1e-6)
        if weight and factor > 1:
            scale *= (0.1 * weight * math.log(factor) + 1.0) ** 2
    # What stands within these objects would count before what is said here.
    ropes = {
        name: {key: value for key, value in each.items() if key != "partial_rotary_factor"}
        for name in ("rope_parameters", "rope_scaling")
        if (each := f.mapping(name)) is not None
    }
    return {
        **config,
        **ropes,
        "head_dim": head_dim,
        "num_key_value_heads": f.integer("num_attention_heads", 1, _MAX),
        # Half a value more than it takes, so that rounding down gives the number whatever the division rounds to.
        "partial_rotary_factor": (mla.rotary_dim + 0.5) / head_dim if mla.plain_dim else 1.0,
        "attention_multiplier": scale,
    }

"""The language model's weights in a multimodal checkpoint: their names there, by which the others are told apart.

Knows the layouts of transformers' classes, today's and those of before; not what the other parts compute.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models.interface import WeightMap

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.encoder.", "model."),  # as transformers saves Qianfan-OCR
    ("language_model.model.blocks.", "model.layers."),  # and Kimi K2.5
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
    ("llm.model.", "model."),
    ("llm.lm_head.", "lm_head."),
    ("language.model.", "model."),
    ("language.lm_head.", "lm_head."),
    ("thinker.model.", "model."),
    ("thinker.lm_head.", "lm_head."),
)
_BARE = ("model.layers.", "lm_head.")
"""How the names begin where the language model lies as in a checkpoint of its own."""


def text_half(weight_map: WeightMap) -> WeightMap:
    """``weight_map`` for a checkpoint that holds the model as its language model, beside others that are skipped."""
    own = (*(theirs for theirs, _ in _PREFIXES), *_BARE)
    return replace(weight_map, prefixes=(*_PREFIXES, *weight_map.prefixes), own=own)

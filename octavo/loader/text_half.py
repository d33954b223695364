"""The language model's weights in a multimodal checkpoint: other names for its own, and which are not its.

Knows the layouts of transformers' classes, today's and those of before; not what the other parts compute.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models.interface import WeightMap

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
)
_OTHERS = (
    "vision_tower.", "vision_model.", "vision_encoder.", "vision_embed_tokens.", "visual.", "image_newline",
    "multi_modal_projector.", "mm_projector.", "embed_vision.", "audio_tower.", "embed_audio.", "connector.",
    "aligner.", "vision_projection.", ".projector.", "image_tower.", "video_tower.",
)  # fmt: skip


def text_half(weight_map: WeightMap) -> WeightMap:
    """``weight_map`` for a checkpoint that holds the model as its language model, beside others that are skipped."""
    return replace(weight_map, prefixes=(*_PREFIXES, *weight_map.prefixes), ignored=(*weight_map.ignored, *_OTHERS))

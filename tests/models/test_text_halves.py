"""The language model of every multimodal class of transformers that makes text: the same logits, or the reason why not.

Red when: a class's names of its language model are not known, a weight of an encoder is taken for one of its own, its
text half is read with another family's defaults, or a class that transformers has is in neither table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import CONFIG_MAPPING

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.config.sections import LoadConfig
from octavo.errors import OctavoError
from octavo.loader.load import load_weights
from octavo.models.transformers_impl import TransformersForCausalLM
from tests.models.families import make_reference
from tests.models.harness import PagedModel
from tests.models.multimodal import CLASSES, make_multimodal, with_text_half

_PARTS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_HALF_ROTATED = {
    "rope_parameters": {**_PARTS["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
_KINDS = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_SIGLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "q_lora_rank": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_experts": None,
}  # fmt: skip
OWN: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        (
            "deepseek_vl", "deepseek_vl_hybrid", "gemma3", "glmasr", "got_ocr2", "granite_speech",
            "granite_speech_plus", "idefics2", "idefics3", "internvl", "janus", "lighton_ocr", "llava", "llava_next",
            "llava_next_video", "llava_onevision", "mistral3", "moss_transcribe_diarize", "pp_chart2table",
            "qianfan_ocr", "qwen2_audio", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
            "vibevoice_asr", "video_llama_3", "video_llava", "vipllava", "voxtral",
        ),
        {},
    ),
    "fast_vlm": {".vision_config": _SIGLIP},
    "fun_asr_nano": {"hidden_size": 64, ".adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "granite4_vision": {".deepstack_layer_map": [[0, 0]], ".spatial_target_layers": [0], ".downsample_rate": "4/8"},
    "kimi_k25": _LATENT,
    "ovis2": {".vocab_size": 320},
    "paddleocr_vl": _PARTS,
    "qwen2_5_omni_thinker": _PARTS,
    "qwen2_5_vl": _PARTS,
    "qwen2_vl": _PARTS,
}  # fmt: skip
"""Model types whose language model is of a family of ours, with what their configs need beside sizes."""
FOREIGN: Mapping[str, Mapping[str, Any]] = {
    "aria": {},
    # The wrappers of Cohere's models leave out the factor that their language models have.
    "aya_vision": {".vision_config": _SIGLIP, "logit_scale": 1.0},
    "cohere2_vision": {"logit_scale": 1.0},
    "cohere_compass": {"rope_parameters": _KINDS},
    "exaone4_5": {},
    "fuyu": {},
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), _HALF_ROTATED),
    "glm4v_moe": {
        **_HALF_ROTATED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "gemma4": {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8},
    "hyperclovax_vision_v2": {},
    "lfm2_vl": {},
}  # fmt: skip
"""Those whose language model runs with transformers' code."""
_NOBODY = "neither Octavo nor transformers has '.*' by itself"
_HALVES = "is_encoder_decoder is true"
_KIND = "it has layers of the kinds "
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "blip", "cosmos3_edge", "deepseek_ocr2", "diffusion_gemma", "emu3", "ernie4_5_vl_moe",
            "granite_docling", "hunyuan_vl", "mistral_large4", "mllama", "molmo2", "muse_glimmer", "muse_spark",
            "step3p7", "unlimited_ocr", "voxtral_realtime",
        ),
        _NOBODY,
    ),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet"), _HALVES),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _KIND + "linear_attention"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _KIND + "linear_attention"),
    **dict.fromkeys(("inkling2", "inkling_mm_model"), _KIND + "hybrid"),
    **dict.fromkeys(("gemma4_unified", "gemma4_unified_assistant"), "use_bidirectional_attention is set"),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "hidden_size is missing"),
    **dict.fromkeys(("nemo_speechlm", "nemotron_h_omni"), "num_hidden_layers is missing"),
    "dots3_note": _KIND + "indexed_attention",
    "gemma3n": "a trial run failed",
    "glm5_next": "head_dim is 0",
    "lfm3_vl": _KIND + "conv",
    "llama4": _KIND + "chunked_attention",
    "paligemma": "attends to its prompt in both directions",
    "qwen4_exp": _KIND,
}  # fmt: skip
"""Those that are refused, as their default config is, with the reason."""
ELSEWHERE: Mapping[str, str] = {
    "blip-2": "text needs a picture",
    "instructblip": "text needs a picture",
    "instructblipvideo": "text needs a picture",
    "cosmos3_omni": "a Qwen3-VL under diffusers' names",
    "gemma4_assistant": "drafts for another model",
    "minimax_m3_vl": "sparse attention; its weights have names that its text half does not",
    "perception_lm": "its encoder is timm's; its language model is a Llama, as Idefics3's",
    "qwen2_5_omni": "holds the thinker, and speaks",
    "qwen3_omni_moe": "holds the thinker, and speaks",
    "shieldgemma2": "classifies pictures",
}
"""Not built here."""
torch.set_num_threads(1)


def load(folder: Path) -> PagedModel:
    config = read_model_config(locate_model(str(folder)))
    paged = PagedModel(config)
    load_weights(paged.model, LoadConfig(str(folder), str(folder), "safetensors", None, 0), config)
    return paged


@pytest.mark.parametrize("model_type", sorted({**OWN, **FOREIGN}))
def test_logits_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    if model_type not in CLASSES:
        pytest.skip("the installed transformers has no such model")
    transformers.logging.set_verbosity_error()
    folder = tmp_path / "model"
    reference = make_multimodal(model_type, {**OWN, **FOREIGN}[model_type], folder)
    prompt = [3 + (7 * index) % 250 for index in range(40)]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0]
    assert read_model_config(locate_model(str(folder))).text_half_of == CLASSES[model_type]
    paged = load(folder)
    assert isinstance(paged.model, TransformersForCausalLM) == (model_type in FOREIGN)
    assert (paged.feed(0, prompt, 17) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("model_type", ["paddleocr_vl", "qwen2_5_vl", "qwen2_vl"])
def test_fields_beside_those_of_the_encoder(model_type: str, tmp_path: Path) -> None:
    """As these were published: one level of fields, and the language model's weights named as if it were alone."""
    folder = tmp_path / "model"
    reference = make_multimodal(model_type, OWN[model_type], folder)
    stated = json.loads((folder / "config.json").read_text())
    text = stated.pop("text_config")
    flat = {**text, **{name: value for name, value in stated.items() if name not in text}, "model_type": model_type}
    flat["architectures"] = [CLASSES[model_type]]
    (folder / "config.json").write_text(json.dumps(flat))
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    bare = {name.replace("model.language_model.", "model."): each for name, each in tensors.items()}
    safetensors.torch.save_file(bare, file)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0]
    assert (load(folder).feed(0, prompt, 17) - expected).abs().max() <= 1e-4


def test_experts_as_they_were_published(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's stacks came with columns first; transformers takes either order, too."""
    folder = tmp_path / "model"
    reference = make_multimodal("qwen3_vl_moe", {}, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    turned = {name: each.transpose(1, 2).contiguous() for name, each in tensors.items() if ".experts." in name}
    assert len(turned) == 6
    safetensors.torch.save_file(tensors | turned, file)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0]
    assert (load(folder).feed(0, prompt, 17) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("outer", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_a_model_within_a_larger_one(outer: str, tmp_path: Path) -> None:
    """As published: the thinker beside what speaks."""
    inner = tmp_path / "inner"
    make_multimodal(f"{outer}_thinker", OWN[f"{outer}_thinker"], inner)
    stated = json.loads((inner / "config.json").read_text())
    whole = {"architectures": ["OmniModel"], "model_type": outer, "thinker_config": stated, "talker_config": {}}
    (inner / "config.json").write_text(json.dumps(whole))
    tensors = {
        f"thinker.{name}": value for name, value in safetensors.torch.load_file(inner / "model.safetensors").items()
    }
    tensors["talker.model.layers.0.input_layernorm.weight"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, inner / "model.safetensors")
    assert read_model_config(locate_model(str(inner))).text_half_of == "OmniModel"
    load(inner)


@pytest.mark.parametrize(
    ("field", "prefix"),
    [("llm_config", "language_model."), ("llm_config", "llm."), ("language_config", "language.")],
)
def test_checkpoints_of_code_that_transformers_does_not_have(field: str, prefix: str, tmp_path: Path) -> None:
    """As InternVL and Ovis were published: none of their code has to run for a language model that we have."""
    reference = make_reference("qwen2")
    reference.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": ["VLChat"], "model_type": "chat", "auto_map": {"AutoModel": "chat.VLChat"}, field: stated}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    file = tmp_path / "model.safetensors"
    tensors = {prefix + name: value for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file({**tensors, "mlp1.0.weight": torch.zeros(1)}, file)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0]
    assert (load(tmp_path).feed(0, prompt, 17) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_the_reason_why_not(model_type: str, tmp_path: Path) -> None:
    if model_type not in CLASSES:
        pytest.skip("the installed transformers has no such model")
    config = CONFIG_MAPPING[model_type]()
    config.architectures = [CLASSES[model_type]]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with pytest.raises(OctavoError, match=REFUSED[model_type]):
        PagedModel(read_model_config(locate_model(str(tmp_path))))


def test_every_class_is_in_a_table() -> None:
    assert set(with_text_half()) - {*OWN, *FOREIGN, *REFUSED, *ELSEWHERE} == set()

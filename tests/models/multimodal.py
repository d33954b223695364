"""Checkpoints of transformers' multimodal classes: a tiny random language model, and the rest by name only.

Weights of encoders are saved as one number each: whoever skips them by name never looks at their shapes, and building
them would take gigabytes. So each class is real, with the names and layouts in which transformers saves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

CLASSES: Mapping[str, str] = {
    **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
}
"""Model type to the class that makes text."""
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "moe_intermediate_size": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "n_layers", "n_layer")


def with_text_half() -> list[str]:
    """Model types whose config has one for a language model, of those that make text."""
    return sorted(name for name in CLASSES if name in CONFIG_MAPPING and _path(CONFIG_MAPPING[name]))


def _path(config_class: Any) -> tuple[str, ...]:
    """Fields that lead to the language model's config."""
    subs = config_class.sub_configs
    if "text_config" in subs:
        return ("text_config",)
    return ("thinker_config", "text_config") if "thinker_config" in subs else ()


def make_multimodal(model_type: str, options: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """Save a checkpoint.

    Args:
        model_type: One of ``with_text_half()``.
        options: Fields of the text half over ``SMALL``; a field of the whole config where its name begins with a dot.
        folder: Where to.

    Returns:
        The model, of which only the language model can be computed.
    """
    torch.manual_seed(len(model_type))
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    inner = {**SMALL, **{name: value for name, value in options.items() if not name.startswith(".")}}
    outer = {name[1:]: value for name, value in options.items() if name.startswith(".")}
    stated: dict[str, Any] = {"text_config": {**type(text)(**inner).to_dict(), "model_type": text.model_type}}
    for name in reversed(_path(config_class)[:-1]):
        stated = {name: stated}
    config = config_class(**stated, **outer)
    _flatten(config)
    config._attn_implementation = "eager"
    with _parameters_without_storage():
        model = getattr(transformers, CLASSES[model_type])(config).eval()
    _fill_language_model(model)
    folder.mkdir()
    state = revert_weight_conversion(model, model.state_dict())
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(state.items(), key=lambda item: "lm_head" in item[0]):
        if tensor.is_meta:
            tensors[name] = torch.zeros(1)
        elif tensor.data_ptr() not in seen:  # tied ones are saved once
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return model


def _flatten(config: Any) -> None:
    """One layer in every part but the language model."""
    for name in type(config).sub_configs:
        sub = getattr(config, name, None)
        if sub is None or name == "text_config":
            continue
        for depth in _DEPTHS:
            if isinstance(getattr(sub, depth, None), int):
                setattr(sub, depth, 1)
        _flatten(sub)


def _language_models(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield model.get_decoder()
    head = model.get_output_embeddings()
    if head is not None:
        yield head


def _fill_language_model(model: PreTrainedModel) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in _language_models(model):
        for module in part.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if parameter not in made:  # tied ones stay one
                    made[parameter] = nn.Parameter(_random(name, parameter), requires_grad=False)
                module._parameters[name] = made[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and "correction" in name:
                    buffer.normal_(0.0, 0.3)
    model.tie_weights()
    # Whoever asks the model for its device gets that of its first parameter.
    name, first = next(iter(model.named_parameters()))
    if first.is_meta:
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = nn.Parameter(torch.zeros(first.shape), requires_grad=False)


def _random(name: str, parameter: torch.Tensor) -> torch.Tensor:
    values = torch.randn(parameter.shape)
    if parameter.dim() > 1:
        return values * 1.2 * parameter.shape[-1] ** -0.5
    return values * 0.1 + (0.0 if name.endswith("bias") else 1.0)


@contextmanager
def _parameters_without_storage() -> Iterator[None]:
    """Buffers are real: no checkpoint brings them."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

"""Whose classes make a model that runs with transformers' code: that package's own, or those of the checkpoint.

Code of a checkpoint runs here, in the process of the engine, and nowhere else; only where the user asks for it
(``trust_remote_code``), and only where Octavo has no such model of its own, or ``model_impl`` is transformers. Files
are taken from the checkpoint's folder: code of another repository is refused, nothing is downloaded. A warning names
the files before the first of them runs. Knows no attention and no weights: ``transformers_probe.py``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from octavo.checkpoint.files import resolve_in_folder
from octavo.checkpoint.foreign import SYNONYMS
from octavo.config.model import CheckpointCode, ModelConfig
from octavo.errors import CheckpointError, ConfigError
from octavo.models.registry import MODELS

logger = logging.getLogger(__name__)
CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"
INTERFACE = "octavo_paged"
"""Our name in transformers' table of attention functions."""
_PADDING_CHECK = "warn_if_padding_and_no_attention_mask"
STAND_INS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "glm4v_moe_text": ("glm4_moe", {"attention_bias": True}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "glm_ocr_text": ("glm4", {"attention_bias": False}),
}
"""Text halves of which transformers has no causal LM by themselves, to one that computes the same for text, and what
their configs mean where they say nothing."""
_REFERENCE = re.compile(r"\w+\.\w+")
_COMPUTED = ("vocab_size", "head_dim", *SYNONYMS)
"""What the engine asks of every config, and a config class may only have as a property."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is made of."""

    config: PretrainedConfig
    model_class: Any

    def make(self, dtype: torch.dtype) -> nn.Module:
        """The model, its attention bound to our interface. On the default device of torch."""
        model = self.model_class._from_config(self.config, attn_implementation=INTERFACE, dtype=dtype).eval()
        for module in model.modules():
            if hasattr(module, _PADDING_CHECK):
                setattr(module, _PADDING_CHECK, _nothing)
        return model


def _nothing(*_: object, **__: object) -> None:
    """Instead of a check that looks for padding, which there is none of: it would wait for the device each step."""


def find_recipe(config: ModelConfig) -> Recipe:
    """The classes for a checkpoint, and its config in their words.

    Raises:
        ConfigError: There is no causal LM for it, or its config class refuses the values; says what would help.
    """
    fields = dict(config.hf)
    model_type = fields.pop("model_type", None)
    for name in ("transformers_version", "auto_map", "torch_dtype", "dtype", "quantization_config"):
        fields.pop(name, None)
    if config.text_half_of is not None and model_type in STAND_INS:
        model_type, defaults = STAND_INS[model_type]
        fields = {**defaults, **fields}
    code = config.code if config.code is not None and config.code.is_trusted else None
    if code is None:
        _check_known(config, model_type)
    try:
        if code is not None and CONFIG in code.classes:
            config_class = load_class(code, CONFIG)
            hf = config_class.from_dict({n: v for n, v in fields.items() if not _is_computed(config_class, n)})
        else:
            hf = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # config classes check themselves, with exceptions of their own
        reason = " ".join(str(error).split())[:300]
        raise refusal(config.architecture, [f"transformers refuses its config: {reason}"]) from error
    return Recipe(hf, MODEL_FOR_CAUSAL_LM_MAPPING[type(hf)] if code is None else load_class(code, MODEL))


def _is_computed(config_class: type, name: str) -> bool:
    found = getattr(config_class, name, None)
    return isinstance(found, property) and found.fset is None


def _check_known(config: ModelConfig, model_type: object) -> None:
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if causal_lm is None and config.text_half_of is not None:
        reason = (
            "of a multimodal checkpoint the language model runs, but neither Octavo nor transformers has "
            f"{model_type!r} by itself"
        )
        raise refusal(config.architecture, [reason])
    if causal_lm is None:
        reasons = [f"transformers has no causal LM for model_type {model_type!r}"]
        if config.code is not None:
            reasons.append(_what_code(config.code))
        raise refusal(config.architecture, reasons)
    # The text half of a multimodal checkpoint has the wrapper's name.
    if causal_lm != config.architecture and config.text_half_of is None:
        reason = f"transformers' causal LM for model_type {model_type!r} is {causal_lm}, not this"
        raise refusal(config.architecture, [reason])


def _what_code(code: CheckpointCode) -> str:
    """Why the checkpoint's own code does not run."""
    if MODEL not in code.classes:
        return f"the checkpoint brings Python code ({', '.join(code.classes)}), but no {MODEL}"
    return (
        f"the checkpoint brings Python code of its own ({', '.join(code.files)}, named by auto_map in "
        "config.json), which could do anything on this machine and runs only with --trust-remote-code: read it first"
    )


def state_config(code: CheckpointCode, fields: Mapping[str, Any], model_impl: str) -> dict[str, Any] | None:
    """config.json as the checkpoint's own config class reads it, with every default it has; runs that class.

    Args:
        code: What the checkpoint brings. The user trusts it.
        fields: Of config.json.
        model_impl: As the user said it.

    Returns:
        Plain fields; None where the model runs without the checkpoint's code, which then has not run.

    Raises:
        ConfigError, CheckpointError: The code cannot be loaded, or refuses the config.
    """
    names = fields.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else code.classes.get(MODEL, "").rpartition(".")[2]
    is_ours = model_impl != "transformers" and (model_impl != "auto" or MODELS.knows(architecture))
    if is_ours or MODEL not in code.classes:
        logger.info("trust_remote_code: no code of %s runs for %s", code.folder, architecture)
        return None
    announce(code, CONFIG, MODEL)
    stated: dict[str, Any] = {**fields, "architectures": [architecture]}
    if CONFIG in code.classes:
        kept = {name: value for name, value in fields.items() if name != "model_type"}
        try:
            hf = load_class(code, CONFIG).from_dict(kept)
            read = json.loads(hf.to_json_string(use_diff=False))
            read |= {name: value for name in _COMPUTED if isinstance(value := getattr(hf, name, None), int | str)}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise refusal(architecture, [f"its config class refuses config.json: {error}"]) from error
        stated |= {name: value for name, value in read.items() if value is not None and name != "architectures"}
    stated.pop("auto_map", None)
    return stated


def announce(code: CheckpointCode, *kinds: str) -> None:
    """Warn of what is about to run: the files of these classes and all that they import of the folder.

    Raises:
        ConfigError: A class is in another repository, or its name cannot be read.
        CheckpointError: A file is missing, or a link out of the folder.
    """
    folder = Path(code.folder)
    files: dict[str, None] = {}
    for reference in (code.classes[kind] for kind in kinds if kind in code.classes):
        if not _REFERENCE.fullmatch(reference):
            why = "is in another repository" if "--" in reference else "is not of the form file.Class"
            raise ConfigError(
                f"auto_map of {folder} names {reference!r:.200}, which {why}: only code in the checkpoint's own folder "
                "is run; put it there, and name it file.Class",
                param="trust_remote_code",
            )
        file = folder / f"{reference.partition('.')[0]}.py"
        if not file.exists():
            raise CheckpointError(str(folder), f"names the code {reference}, but has no {file.name}")
        for each in (file, *map(Path, get_relative_import_files(file))):
            resolve_in_folder(each)
            files[each.name] = None
    logger.warning(
        "trust_remote_code: running Python code of the checkpoint %s: %s. It can do whatever this process can.",
        folder, ", ".join(files),
    )  # fmt: skip


def load_class(code: CheckpointCode, kind: str) -> Any:
    """A class of a checkpoint that has been announced; imports its file.

    Raises:
        ConfigError: The code cannot be imported, or has no such class.
    """
    reference = code.classes[kind]
    try:
        return get_class_from_dynamic_module(reference, code.folder, local_files_only=True)
    except Exception as error:  # whatever foreign code may raise while it is imported
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the checkpoint's own code {reference} cannot be imported: {type(error).__name__}: {reason}",
            param="trust_remote_code",
        ) from error


def refusal(architecture: str, reasons: list[str]) -> ConfigError:
    """The error for a model that cannot run so, with all reasons."""
    return ConfigError(
        f"{architecture} cannot run with transformers' code (model_impl transformers): {'; '.join(reasons)}",
        param="model_impl",
    )

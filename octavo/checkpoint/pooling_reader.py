"""What the files of a model say about pooling: its architecture's name, sentence-transformers' modules, labels.

A folder with ``modules.json`` is a pipeline (transformer, pooling, perhaps normalisation); whatever stands in it that
cannot be honoured is an error, because the vectors would silently be others. Knows no torch and no model class.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from octavo.checkpoint.files import MAX_CONFIG_BYTES, read_json_object, read_text
from octavo.checkpoint.locate import LocatedModel
from octavo.checkpoint.values import Fields
from octavo.config.model import ModelConfig
from octavo.config.pooling import StoredPooling
from octavo.errors import CheckpointError

ENCODERS = frozenset(
    f"{family}{kind}"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "ModernBert")
    for kind in ("Model", "ForMaskedLM", "ForSequenceClassification")
)
"""Architectures whose attention looks both ways."""
_OFFSET_POSITIONS = ("Roberta", "XLMRoberta", "Camembert")
"""Families whose first position is ``pad_token_id + 1``."""
_POOLING_MODES = {
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_lasttoken": "LAST",
    "pooling_mode_mean_tokens": "MEAN",
}
_GGUF_POOLING = {1: "MEAN", 2: "CLS", 3: "LAST"}
_MODULE = re.compile(r"^sentence_transformers\.(?:[a-z_]+\.)*(Transformer|Pooling|Normalize|Dense|\w+)$")
_FOLDER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,100}$")
_MAX_LABELS = 1 << 20


def read_pooling(located: LocatedModel, model: ModelConfig) -> StoredPooling:
    """What there is to know before anything is asked.

    Args:
        located: Folder or file.
        model: Its config.

    Raises:
        CheckpointError: The files ask for something that cannot be honoured; names file and field.
    """
    folder = Path(located.path)
    config_file = str(folder / "config.json") if folder.is_dir() else str(folder)
    f = Fields(model.hf, config_file)
    is_encoder = model.architecture in ENCODERS
    is_classifier = model.architecture.endswith("ForSequenceClassification")
    # "GPT2Model" is one, "GPT2LMHeadModel" is not.
    is_bare = model.architecture.endswith("Model") and not model.architecture.endswith(("HeadModel", "HeadsModel"))
    labels = _labels(f)
    stored = StoredPooling(
        task="classify" if is_classifier else "embed" if is_encoder or is_bare else None,
        is_encoder=is_encoder,
        activation=_classifier_activation(f) if is_classifier else None,
        # Two is transformers' default, which files leave out.
        num_labels=len(labels) or f.optional_integer("num_labels", 1, _MAX_LABELS) or (2 if is_classifier else 0),
        labels=labels,
        num_positions=_num_positions(f, model),
        pooling_type=_classifier_pooling(f, model) if is_classifier and is_encoder else _gguf_pooling(f),
    )
    if not is_classifier and folder.is_dir() and (folder / "modules.json").exists():
        return _with_modules(stored, folder)
    return stored


def _labels(f: Fields) -> tuple[str, ...]:
    """Names in the order of their indices; empty when the config has none."""
    table = f.mapping("id2label")
    if table is None:
        return ()
    names = {str(key): str(value) for key, value in table.items()}
    if set(names) != {str(index) for index in range(len(names))}:
        raise f.error("id2label", "must name the labels 0, 1, 2 and so on")
    return tuple(names[str(index)] for index in range(len(names)))


def _classifier_activation(f: Fields) -> str | None:
    """As the cross-encoder's config says, else by the kind of its problem; None for what is usual."""
    nested = f.mapping("sentence_transformers") or {}
    name = nested.get("activation_fn") or f.values.get("sbert_ce_default_activation_function")
    if isinstance(name, str):
        known = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
        kind = name.rsplit(".", 1)[-1]
        if kind not in known:
            raise f.error("activation_fn", f"is {name!r:.80}; known are {', '.join(known)}")
        return known[kind]
    return {"multi_label_classification": "sigmoid", "regression": "none"}.get(str(f.values.get("problem_type")))


def _classifier_pooling(f: Fields, model: ModelConfig) -> str | None:
    """ModernBERT's heads say what they read."""
    if not model.architecture.startswith("ModernBert"):
        return "CLS"
    return _one_of(f, "classifier_pooling", f.string("classifier_pooling", "cls"), {"cls": "CLS", "mean": "MEAN"})


def _gguf_pooling(f: Fields) -> str | None:
    """What a GGUF header says; its number stands in the config that was made of it."""
    kind = f.optional_integer("gguf_pooling_type", 0, 255) or 0
    if kind and kind not in _GGUF_POOLING:
        raise f.error("pooling_type", f"is {kind}; supported are 0 (none), 1 (mean), 2 (first token), 3 (last token)")
    return _GGUF_POOLING.get(kind)


def _num_positions(f: Fields, model: ModelConfig) -> int | None:
    if not any(model.architecture.startswith(family) for family in _OFFSET_POSITIONS):
        return None
    padding = f.optional_integer("pad_token_id", 0, 2**31 - 1)
    return model.max_position_embeddings - (1 if padding is None else padding) - 1


def _with_modules(stored: StoredPooling, folder: Path) -> StoredPooling:
    """``stored`` with what sentence-transformers' pipeline says."""
    file = folder / "modules.json"
    try:
        modules: Any = json.loads(read_text(file, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), f"is not valid JSON: {error}") from error
    if not isinstance(modules, list):
        raise CheckpointError(str(file), "must be a list of modules")
    pooling_type, activation = None, "none"
    for module in cast("list[Any]", modules):
        entry = cast("dict[str, Any]", module) if isinstance(module, dict) else {}
        found = _MODULE.match(str(entry.get("type")))
        kind = found[1] if found else str(entry.get("type"))
        if kind == "Pooling":
            path = str(entry.get("path"))
            if not _FOLDER.match(path):
                raise CheckpointError(str(file), f"has a module in {path!r:.80}, which is no folder of the model")
            pooling_type = _pooling_type(folder / path / "config.json")
        elif kind == "Normalize":
            activation = "normalize"
        elif kind != "Transformer":
            raise CheckpointError(
                str(file), f"has a module {kind!r:.80}; Transformer, Pooling and Normalize are supported"
            )
    s = _optional_file(folder / "sentence_bert_config.json")
    return StoredPooling(
        task="embed",
        is_encoder=stored.is_encoder,
        pooling_type=pooling_type,
        activation=activation,
        max_seq_length=s.optional_integer("max_seq_length", 1, 2**31 - 1),
        num_positions=stored.num_positions,
        is_lower_case=s.boolean("do_lower_case", False),
        default_prompt=_default_prompt(folder),
    )


def _optional_file(file: Path) -> Fields:
    return Fields(read_json_object(file) if file.exists() else {}, str(file))


def _default_prompt(folder: Path) -> str | None:
    f = _optional_file(folder / "config_sentence_transformers.json")
    prompts = f.mapping("prompts") or {}
    text = prompts.get(f.string("default_prompt_name", ""))
    return text if isinstance(text, str) else None


def _pooling_type(file: Path) -> str:
    f = Fields(read_json_object(file), str(file))
    stated = f.values.get("pooling_mode")
    if isinstance(stated, str):  # as newer versions write it
        return _one_of(f, "pooling_mode", stated, {"cls": "CLS", "lasttoken": "LAST", "mean": "MEAN"})
    chosen = [name for name in f.values if name.startswith("pooling_mode_") and f.boolean(name, False)]
    if len(chosen) != 1 or chosen[0] not in _POOLING_MODES:
        asked = ", ".join(chosen) or "nothing"
        raise f.error("pooling_mode_*", f"asks for {asked}; one of {', '.join(_POOLING_MODES)} is supported")
    return _POOLING_MODES[chosen[0]]


def _one_of(f: Fields, name: str, value: str, possible: dict[str, str]) -> str:
    if value not in possible:
        raise f.error(name, f"is {value!r:.60}; supported are {', '.join(possible)}")
    return possible[value]

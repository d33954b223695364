"""What a checkpoint says about turning hidden states into one vector or a few scores, and how that is settled.

``StoredPooling`` is what the files say (``checkpoint/pooling_reader.py``), ``PoolingConfig`` what the engine does;
``resolve_pooling`` makes one out of the other and what the user asked for. Knows no torch and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.config.args import EngineArgs
from octavo.config.engine import Decision
from octavo.config.sections import PoolingConfig
from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean

POOLING_TYPES = ("CLS", "LAST", "MEAN")
ACTIVATIONS = ("none", "normalize", "softmax", "sigmoid")
_POOLER_KEYS = ("pooling_type", "seq_pooling_type", "use_activation", "normalize", "activation")


@dataclass(frozen=True, slots=True)
class StoredPooling:
    """What the files of a model say."""

    task: str | None = None
    """``embed`` or ``classify`` where they are made for it; None for a model that generates."""
    is_encoder: bool = False
    """Every token sees the whole text, so it cannot generate."""
    pooling_type: str | None = None
    activation: str | None = None
    """``normalize``, ``softmax``, ``sigmoid`` or ``none``."""
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    max_seq_length: int | None = None
    """Longest text that the authors recommend."""
    num_positions: int | None = None
    """Longest text that the position table allows, where that is not ``max_position_embeddings``."""
    is_lower_case: bool = False
    """Texts are put into small letters before they are tokenised."""
    default_prompt: str | None = None
    """What the authors' own program puts before a text that comes without a prompt; nobody does so here."""


def resolve_pooling(
    args: EngineArgs, stored: StoredPooling, architecture: str, notes: list[Decision]
) -> PoolingConfig | None:
    """Whether the engine pools, and how; None for one that generates.

    Args:
        args: ``runner``, ``convert`` and ``pooler_config`` are read.
        stored: What the files say.
        architecture: For messages.
        notes: Gets the Decisions.

    Raises:
        ConfigError: The model cannot do what was asked.
    """
    convert = None if args.convert in ("auto", "none") else args.convert
    if not _is_pooling(args, stored, convert, notes):
        _check_generates(args, stored, convert, architecture)
        return None
    task = convert or stored.task or "embed"
    if task == "classify" and not stored.num_labels:
        raise ConfigError(
            f"convert is classify, but {architecture} has no classification head in its config (num_labels)",
            param="convert",
        )
    asked = _pooler_config(args.pooler_config)
    default_type = "CLS" if stored.is_encoder else "LAST"
    pooling_type = asked.get("pooling_type") or stored.pooling_type or default_type
    activation = asked.get("activation") or stored.activation or _default_activation(task, stored.num_labels)
    if task == "embed" and activation in ("softmax", "sigmoid"):
        activation = "normalize"
    if "use_activation" in asked:
        use_activation = bool(asked["use_activation"])
        if use_activation and activation == "none":
            activation = _default_activation(task, stored.num_labels)
        elif not use_activation:
            activation = "none"
    what = f"{task}, {pooling_type} pooling, activation {activation}"
    notes.append(Decision("pooling", what, "pooler_config" if asked else "the model's files, else usual for its kind"))
    if stored.default_prompt and task == "embed":
        reason = f"write {stored.default_prompt!r:.100} before texts yourself, as sentence-transformers does unasked"
        notes.append(Decision("prompt", "none", reason))
    return PoolingConfig(
        task=task,
        pooling_type=pooling_type,
        activation=activation,
        is_encoder=stored.is_encoder,
        num_labels=stored.num_labels if task == "classify" else 0,
        labels=stored.labels if task == "classify" else (),
        is_lower_case=stored.is_lower_case,
    )


def _is_pooling(args: EngineArgs, stored: StoredPooling, convert: str | None, notes: list[Decision]) -> bool:
    if args.runner != "auto":
        return args.runner == "pooling"
    if stored.task is None and convert is None:
        return False
    reason = f"asked for by convert {convert}" if convert else "what the model's files are made for"
    notes.append(Decision("runner", "pooling", reason))
    return True


def _check_generates(args: EngineArgs, stored: StoredPooling, convert: str | None, architecture: str) -> None:
    if stored.is_encoder:
        raise ConfigError(
            f"runner is generate, but {architecture} is an encoder, which makes no text: leave it out", param="runner"
        )
    if args.pooler_config or convert is not None:
        name = "pooler_config" if args.pooler_config else "convert"
        raise ConfigError(f"{name} is given, but runner is generate: use --runner pooling", param=name)


def in_one_piece(args: EngineArgs, notes: list[Decision]) -> EngineArgs:
    """What an encoder needs: every token sees the whole text, so nothing of it can be computed before the rest."""
    reason = "every token of an encoder sees the whole text"
    notes.append(Decision("enable_chunked_prefill", "off", reason))
    notes.append(Decision("enable_prefix_caching", "off", reason))
    if args.long_prefill_token_threshold:
        raise ConfigError(
            f"long_prefill_token_threshold is {args.long_prefill_token_threshold}, but {reason}: leave it out",
            param="long_prefill_token_threshold",
        )
    return replace(args, enable_chunked_prefill=False, enable_prefix_caching=False)


def _default_activation(task: str, num_labels: int) -> str:
    if task == "embed":
        return "normalize"
    return "sigmoid" if num_labels == 1 else "softmax"


def _pooler_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked, with one name for each thing."""
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _POOLER_KEYS:
            raise ConfigError(
                f"pooler_config has {name!r}, but can only set {', '.join(_POOLER_KEYS)}."
                + did_you_mean(name, _POOLER_KEYS),
                param="pooler_config",
            )
        if value is None:
            continue
        if name in ("pooling_type", "seq_pooling_type"):
            checked["pooling_type"] = _one_of(name, str(value).upper(), POOLING_TYPES)
        elif name == "activation":
            checked["activation"] = _one_of(name, str(value).lower(), ACTIVATIONS)
        elif isinstance(value, bool):
            checked["use_activation"] = value
        else:
            raise ConfigError(f"pooler_config: {name} is {value!r}, but must be true or false", param="pooler_config")
    return checked


def _one_of(name: str, value: str, possible: tuple[str, ...]) -> str:
    if value not in possible:
        raise ConfigError(
            f"pooler_config: {name} is {value!r:.60}, but must be one of {', '.join(possible)}", param="pooler_config"
        )
    return value

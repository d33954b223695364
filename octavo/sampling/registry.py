"""Third-party LogitsProcessors: found by import path or through the entry point group, made once per worker.

Knows no request. ``logits_processor.py`` has the Protocol, ``per_request.py`` the adapter for plain functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from octavo.errors import ConfigError
from octavo.sampling.logits_processor import LogitsProcessor, ProcessorContext

ENTRY_POINT_GROUP = "octavo.logits_processors"
_MEMBERS = ("keeps_argmax", "add", "remove", "apply")


def load_processors(paths: Sequence[str], context: ProcessorContext) -> list[LogitsProcessor]:
    """Make the processors named by ``paths`` (``module:Class``), then those that installed packages offer.

    Raises:
        ConfigError: A path cannot be imported, or what it names is not a LogitsProcessor.
    """
    classes: list[type[Any]] = [_import_class(path) for path in paths]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        candidate = _import_class(entry.value)
        if candidate not in classes:
            classes.append(candidate)
    return [processor_class(context) for processor_class in classes]


def _import_class(path: str) -> type[Any]:
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise ConfigError(
            f"logits processor {path!r} must be an import path like 'package.module:Class'", param="logits_processors"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"logits processor {path!r} cannot be imported: {error}", param="logits_processors"
        ) from error
    missing = [member for member in _MEMBERS if member not in dir(found)]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"{path!r} is not a LogitsProcessor class; it lacks: {', '.join(missing) or 'being a class'}",
            param="logits_processors",
        )
    return found

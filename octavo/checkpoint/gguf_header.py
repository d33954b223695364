"""Typed access to the keys that a GGUF header has for its own architecture. Complaints name the file and the key."""

from __future__ import annotations

import math
from typing import Any, cast

from octavo.checkpoint.gguf_file import GGUFFile
from octavo.errors import CheckpointError


class GGUFHeader:
    """Keys of the file's own architecture.

    Args:
        gguf: The open file.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.file = str(gguf.path)
        self.prefix = gguf.metadata.get("general.architecture")

    def error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        """The error to raise about this file."""
        return CheckpointError(self.file, reason, tensor=tensor)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``architecture.key`` as the file has it."""
        return self.gguf.metadata.get(f"{self.prefix}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; a list with one value per layer is accepted when all are the same."""
        value = self.get(key, default)
        items = cast("list[Any]", value) if isinstance(value, list) else []
        if items:
            if any(item != items[0] for item in items):
                raise self.error(f"{self.prefix}.{key} differs between layers, which is not supported")
            return self.checked(key, items[0])
        return self.checked(key, value)

    def number(self, key: str) -> float:
        """A finite number that has to be there."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{self.prefix}.{key} is {value!r:.60}, but must be a number")
        return float(value)

    def checked(self, key: str, value: Any) -> int:
        """``value`` of ``key``, which must be an integer from 0."""
        if value is None:
            raise self.error(f"the metadata key {self.prefix}.{key} is missing")
        if type(value) is not int or value < 0:
            raise self.error(f"{self.prefix}.{key} is {value!r:.60}, but must be an integer")
        return value

"""Typed access to the fields of a config that someone else wrote. Every complaint names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from octavo.errors import CheckpointError

MAX_NUMBER = 1e300
"""Larger than any setting; smaller than the largest float, so that integers compared with it convert."""


class Fields:
    """The fields of one config file.

    Args:
        values: The parsed file.
        file: Its name, for errors.
        where: What stands before a field's name in errors, such as ``rope_scaling.``.
    """

    def __init__(self, values: Mapping[str, Any], file: str, where: str = "") -> None:
        self.values = values
        self.file = file
        self.where = where
        self.defaults: Mapping[str, Any] = {}
        self.is_foreign = False
        """Of a family that Octavo has no model for: what is not understood may be right all the same."""

    def error(self, name: str, reason: str) -> CheckpointError:
        """The error to raise about field ``name``."""
        return CheckpointError(self.file, f"{self.where}{name} {reason}")

    def _missing(self, name: str) -> CheckpointError:
        if not self.is_foreign:
            return self.error(name, "is missing")
        family = f"{self.values.get('model_type')!r:.60}"
        return self.error(
            name,
            f"is missing: {family} is no family that Octavo knows, nor is this a usual language model's config",
        )

    def get(self, name: str) -> Any:
        """The field, or the family's default when it is absent; None for null."""
        return self.values[name] if name in self.values else self.defaults.get(name)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in ``[low, high]``, or None when the field is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"is {value!r:.60}, but must be an integer from {low} to {high}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in ``[low, high]`` that has to be there."""
        value = self.optional_integer(name, low, high)
        if value is None:
            raise self._missing(name)
        return value

    def number(self, name: str, default: float | None, *, low: float, high: float = MAX_NUMBER) -> float:
        """A number in ``[low, high]``; ``default`` None means that it has to be there."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return default
        # NaN fails every comparison, and Python compares an integer of any size with a float exactly.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(name, f"is {value!r:.60}, but must be a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, name: str, length: int, *, low: float) -> list[float]:
        """A list of ``length`` finite numbers, each at least ``low``."""
        value = self.get(name)
        if not isinstance(value, list) or len(cast("list[Any]", value)) != length:
            raise self.error(name, f"must be a list of {length} numbers")
        items = cast("list[Any]", value)
        one = Fields({f"{name}[{i}]": item for i, item in enumerate(items)}, self.file, self.where)
        return [one.number(f"{name}[{i}]", None, low=low) for i in range(length)]

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r:.60}, but must be true or false")
        return value

    def string(self, name: str, default: str) -> str:
        """A string."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, f"is {value!r:.60}, but must be a string")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object, or None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"is {value!r:.60}, but must be an object")
        return cast("dict[str, Any]", value)

    def token_ids(self, name: str, vocab_size: int) -> list[int]:
        """A token id or a list of them, each below ``vocab_size``; empty when absent or null."""
        value = self.get(name)
        if value is None:
            return []
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise self.error(name, f"holds {item!r:.60}, but token ids go from 0 to {vocab_size - 1}")
        return items

"""One thing that a user may set: its kind, help text, choices and bounds, and the check that every source goes through.

The command line, a YAML file, and a Python keyword all end in ``Setting.check``: text is parsed, anything else is
verified, and an error names the setting, the value, and what is possible. Knows no particular setting (``args.py``) and
no command line (``flags.py``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean, format_count, parse_count, shorten

Kind = Literal["text", "path_or_text", "count", "number", "switch", "names", "table"]
"""``count`` is an integer that also takes ``16K``; ``names`` a tuple of strings; ``table`` a JSON object."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything about a field but its name and default."""

    kind: Kind
    help: str
    group: str
    choices: tuple[str, ...] = ()
    """Named values. With a numeric kind they are allowed beside numbers."""
    open_choices: bool = False
    """Other texts are allowed too: an import path, or a name that somebody registered."""
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    """``low`` itself is not allowed."""
    optional: bool = False
    """None is a value: "decide for me"."""
    short: tuple[str, ...] = ()
    """Further spellings of the flag, such as ``-tp``."""
    metavar: str | None = None

    def check(self, name: str, value: object) -> Any:
        """``value`` in the field's type.

        Raises:
            ConfigError: It is not possible; ``param`` is ``name``.
        """
        if value is None:
            if self.optional:
                return None
            if self.kind not in ("names", "table"):
                raise self._refusal(name, value)
            return () if self.kind == "names" else dict[str, Any]()
        match self.kind:
            case "count" | "number":
                return self._check_number(name, value)
            case "switch":
                return self._check_switch(name, value)
            case "names":
                return self._check_names(name, value)
            case "table":
                return self._check_table(name, value)
            case "text" | "path_or_text":
                return self._check_text(name, value)

    def possible(self) -> str:
        """What may be given, in words."""
        words: list[str] = []
        if self.choices:
            words.append(", ".join(self.choices) + (", or an import path module:Class" if self.open_choices else ""))
        match self.kind:
            case "count" | "number":
                noun = "an integer" if self.kind == "count" else "a number"
                words.append(f"{noun}{self._bounds()}" + (" (16K and 16k work too)" if self.kind == "count" else ""))
            case "switch":
                words.append("true or false")
            case "names":
                words.append("one or several names")
            case "table":
                words.append('a JSON object such as {"key": 1}')
            case "text" | "path_or_text":
                words.extend([] if self.choices else ["a non-empty text"])
        return ", or ".join(words)

    def _bounds(self) -> str:
        low = "" if self.low is None else f" {'>' if self.above_low else '>='} {_shown(self.low)}"
        high = "" if self.high is None else f" <= {_shown(self.high)}"
        return " and".join(bound for bound in (low, high) if bound)

    def _refusal(self, name: str, value: object, hint: str = "") -> ConfigError:
        return ConfigError(f"{name} is {shorten(repr(value))}, but must be {self.possible()}.{hint}", param=name)

    def _check_number(self, name: str, value: object) -> int | float | str:
        number: object = value
        if isinstance(value, str):
            if value in self.choices:
                return value
            try:
                number = parse_count(value) if self.kind == "count" else float(value)
            except ValueError:
                raise self._refusal(name, value) from None
        wanted = int if self.kind == "count" else int | float
        if not isinstance(number, wanted) or isinstance(number, bool) or not math.isfinite(number):
            raise self._refusal(name, value)
        too_low = self.low is not None and (number <= self.low if self.above_low else number < self.low)
        if too_low or (self.high is not None and number > self.high):
            raise self._refusal(name, value)
        return number if self.kind == "count" else float(number)

    def _check_switch(self, name: str, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise self._refusal(name, value)

    def _check_text(self, name: str, value: object) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(cast("os.PathLike[str]", value))
        if not isinstance(value, str) or not value.strip():
            raise self._refusal(name, value)
        if not self.choices or value in self.choices:
            return value
        if value.lower() in self.choices:
            return value.lower()
        if self.open_choices:
            return value
        raise self._refusal(name, value, did_you_mean(value, self.choices))

    def _check_names(self, name: str, value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, list | tuple):
            raise self._refusal(name, value)
        names = tuple(item for item in cast("Sequence[object]", value) if isinstance(item, str) and item.strip())
        if len(names) != len(cast("Sequence[object]", value)):
            raise self._refusal(name, cast("object", value))
        return names

    def _check_table(self, name: str, value: object) -> Mapping[str, Any]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self._refusal(name, value) from None
        if not isinstance(value, Mapping):
            raise self._refusal(name, value)
        table = cast("Mapping[object, Any]", value)
        if any(not isinstance(key, str) for key in table):
            raise self._refusal(name, table)
        return dict(cast("Mapping[str, Any]", table))


def setting(default: Any, kind: Kind, group: str, help: str, **options: Any) -> Any:
    """A dataclass field that carries its ``Setting``; ``options`` are the further fields of ``Setting``."""
    metadata = {"setting": Setting(kind, help, group, **options)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict[str, Any], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, Setting]:
    """Field name to ``Setting``, in order."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(cls)}


def _shown(bound: float) -> str:
    return format_count(int(bound)) if float(bound).is_integer() else f"{bound:g}"

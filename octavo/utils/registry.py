"""Registry: a table from a name to ``"module:Class"``, imported on first use.

So an optional dependency is needed only when its implementation is chosen, and the table itself costs nothing to
import. Third parties add names through an entry point group or by giving an import path ``module:Class``. Knows
nothing of what the classes are: the registries of models, backends and quantisation methods are made from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from octavo.errors import ConfigError


class Registry:
    """Names, aliases, and names that are known but have no implementation here yet."""

    def __init__(
        self,
        noun: str,
        param: str,
        group: str,
        table: Mapping[str, str],
        *,
        aliases: Mapping[str, str] | None = None,
        absent: Mapping[str, str] | None = None,
        normalise: Callable[[str], str] = str,
    ) -> None:
        """Make a registry.

        Args:
            noun: What the entries are, for messages: ``attention backend``.
            param: The setting that names an entry; becomes ``ConfigError.param``.
            group: Entry point group of third parties.
            table: Name to ``module:Class``.
            aliases: Other spellings, as other engines use them.
            absent: Names that users may expect, with the reason why they are not here.
            normalise: Applied to a name before the lookup, such as ``str.lower``.
        """
        self.noun = noun
        self.param = param
        self._group = group
        self._table: dict[str, str | type] = dict(table)
        self._aliases = dict(aliases or {})
        self.absent = dict(absent or {})
        self._normalise = normalise

    def names(self) -> list[str]:
        """Names with an implementation, built in ones first, then those of installed packages."""
        extra = [point.name for point in entry_points(group=self._group)]
        return [*self._table, *(name for name in sorted(set(extra)) if name not in self._table)]

    def knows(self, name: str) -> bool:
        """Whether ``load`` has something to import for this name."""
        name = self.resolve_name(name)
        return ":" in name or name in self._table or name in {point.name for point in entry_points(group=self._group)}

    def register(self, name: str, target: str | type) -> None:
        """Add an entry, or put another in its place, for this process.

        An engine in a process of its own starts with the table as it is in the source: there an entry point is what
        makes a name known.

        Args:
            name: As it will be looked up, in its canonical spelling.
            target: ``module:Class``, or the class.
        """
        self._table[name] = target

    def resolve_name(self, name: str) -> str:
        """The canonical spelling of a name; import paths are left as they are."""
        if ":" in name:
            return name
        name = self._normalise(name)
        return self._aliases.get(name, name)

    def load(self, name: str) -> Any:
        """Import the class behind a name, alias or import path.

        Raises:
            ConfigError: The name is unknown, known to be absent, or cannot be imported; says what is possible.
        """
        name = self.resolve_name(name)
        target: str | type | None = name if ":" in name else self._table.get(name)
        if isinstance(target, type):
            return target
        if target is None:
            points = [point for point in entry_points(group=self._group) if point.name == name]
            target = points[0].value if points else None
        if target is None:
            reason = self.absent.get(name)
            why = f"is not available: {reason}" if reason else "is not known"
            raise ConfigError(
                f"{self.noun} {name!r} {why}. Available: {', '.join(self.names())}; or an import path 'module:Class'.",
                param=self.param,
            )
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{self.noun} {name!r} cannot be imported from {target!r}: {error}", param=self.param
            ) from error

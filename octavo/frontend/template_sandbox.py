"""A Jinja environment in which a stranger's template cannot do harm: no attribute tricks, no endless work, no flood.

jinja2's own sandbox keeps templates away from Python's insides. It bounds neither time nor memory, so this one counts:
every turn of a loop, every call and every filter costs a step, every text or list that comes out of an operation costs
its length, and both are limited by the size of what the template was given. Operations whose result can be much larger
than all they were given (``*``, padding, ``replace``, ``join``) are priced before they run.

Knows no messages and no models; ``chat_template.py`` does.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 64 << 20
"""A conversation that becomes longer than this is refused; the longest contexts of today are a tenth of it."""
MAX_SECONDS = 5.0
MAX_COMPILED = 16
BASE_STEPS, STEPS_PER_ITEM = 100_000, 4
"""Steps of a template: so many, and so many for each character or item that it was given."""
BASE_CHARS, CHARS_PER_CHAR = 8 << 20, 200
CHARS_PER_ITEM = 16
"""An item of a list weighs like so many characters."""
MAX_PADDING = 10_000
MAX_INTEGER_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{5,}|\*|\{[^{}]*\{")
"""Widths of five digits, or widths that come out of a value."""
_ABSENT_FILTERS = (
    "filesizeformat", "forceescape", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
"""Filters for web pages, with ways to make much out of little."""
_PADDING_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson", "truncate")
_TEXT_FILTERS = (
    "capitalize", "center", "e", "escape", "format", "indent", "lower", "replace", "safe", "string", "title", "trim",
    "truncate", "upper", "urlencode", "wordcount",
)  # fmt: skip
"""They make a text of whatever they get."""


class TemplateRefusedError(TemplateError):
    """A template called ``raise_exception``."""


class _Meter(threading.local):
    """What the rendering of this thread has left."""

    steps: int = 0
    chars: int = 0
    end_s: float = 0.0

    def fill(self, size: int) -> None:
        """For a template that was given so many characters and items."""
        self.steps = BASE_STEPS + STEPS_PER_ITEM * size
        self.chars = min(4 * MAX_RENDERED_CHARS, BASE_CHARS + CHARS_PER_CHAR * size)
        self.end_s = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """One step is done."""
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError("the template does not come to an end")
        if not self.steps & 15 and time.monotonic() > self.end_s:
            raise SecurityError(f"the template takes longer than {MAX_SECONDS:g} s")

    def pay(self, size: int) -> None:
        """So many characters come into being."""
        self.chars -= size
        if self.chars < 0:
            raise SecurityError("the template makes too much text")

    def pay_for(self, value: object, *, as_text: bool = False) -> None:
        """Pay for a value with all that is in it. What is in it twice counts twice: so lists that hold one another
        cannot double at every step, and no later comparison or conversion of them is a surprise.

        Args:
            value: Any.
            as_text: It is about to become a text.
        """
        pending: list[object] = [value]
        while pending:
            each = pending.pop()
            if isinstance(each, str):
                self.pay(len(each) if as_text or each is value else CHARS_PER_ITEM)
            elif isinstance(each, dict):
                pairs = cast("dict[object, object]", each)
                self.pay(CHARS_PER_ITEM * (1 + len(pairs)))
                pending.extend(pairs.values())
                pending.extend(pairs)
            elif isinstance(each, list | tuple):
                items = cast("Sequence[object]", each)
                self.pay(CHARS_PER_ITEM * (1 + len(items)))
                pending.extend(items)
            else:
                self.pay(CHARS_PER_ITEM)

    def pass_on(self, value: Any) -> Any:
        """``value``, paid for."""
        if isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("the template makes too large a number")
        elif isinstance(value, str | list | tuple | dict):
            self.pay_for(cast("object", value))
        return cast("Any", value)


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what a trainer learns from: here just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Use it through ``render_bounded``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self._meter = _Meter()
        self._lock = threading.Lock()
        self._cache: dict[str, Template] = {}
        names = cast("Any", self)  # jinja2 leaves the types of both tables open
        names.filters["tojson"] = _tojson
        for name in _ABSENT_FILTERS:
            names.filters.pop(name, None)
        for name, function in list(names.filters.items()):
            names.filters[name] = self._metered(name, function)
        names.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        names.globals.pop("lipsum", None)

    # ------------------------------------------------------------------------------------------------------- render

    def render_bounded(self, source: str, variables: dict[str, Any]) -> str:
        """The text of a template.

        Raises:
            TemplateError: The template is wrong, refuses, or does too much.
        """
        parts: list[str] = []
        size = 0
        self._meter.fill(_size(variables, 64) + len(source))
        for part in self._compiled(source).generate(variables):
            size += len(part)
            if size > MAX_RENDERED_CHARS:
                raise SecurityError(f"the rendered text is longer than {MAX_RENDERED_CHARS} characters")
            parts.append(part)
        return "".join(parts)

    def _compiled(self, source: str) -> Template:
        """Compiling takes a hundred times as long as rendering, so the last few are kept."""
        with self._lock:
            found = self._cache.pop(source, None)
            if found is not None:
                self._cache[source] = found  # the newest again
                return found
        made = self.from_string(source)
        with self._lock:
            self._cache[source] = made
            while len(self._cache) > MAX_COMPILED:
                del self._cache[next(iter(self._cache))]
        return made

    # ---------------------------------------------------------------------------------------------- jinja2 asks here

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        """Before a template is compiled: put tolls into whatever can run again and again, and meters behind whatever
        makes text or lists."""
        for block in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            size = sum(len(data.data) for data in block.find_all(nodes.TemplateData))
            block.body.insert(0, nodes.ExprStmt(_call("toll", [nodes.Const(size)])))
        _rewrite(source)
        return super()._generate(source, name, filename, defer_init)

    def toll(self, size: int) -> str:
        """One turn of a loop, or one call of a macro, with so many characters of its own."""
        self._meter.step()
        self._meter.pay(size)
        return ""

    def emit(self, value: object) -> str:
        """``{{ value }}``."""
        if not isinstance(value, str):
            self._meter.pay_for(value, as_text=True)
            value = str(value)
        self._meter.pay(len(value))
        return value

    def join_texts(self, *values: object) -> str:
        """``a ~ b``."""
        return "".join([self.emit(value) for value in values])

    def paid(self, value: object) -> object:
        """``[a, b]``, ``{a: b}`` or ``(a, b)``."""
        self._meter.pay_for(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of ``intercepted_binops``."""
        self._meter.step()
        if operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(some, str | list | tuple) and isinstance(times, int):
                    self._meter.pay(len(cast("Sequence[object]", some)) * max(0, times))
        elif operator == "**" and not _is_small_power(left, right):
            raise SecurityError("the template raises a number to too high a power")
        elif operator == "%" and isinstance(left, str):
            self._price_format(left, [right])
        return self._meter.pass_on(super().call_binop(context, operator, left, right))

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803 - as jinja2 has it
        """A call in a template."""
        self._meter.step()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            self._price_method(owner, getattr(method, "__name__", ""), args, kwargs)
        return self._meter.pass_on(super().call(__context, __obj, *args, **kwargs))

    def _price_method(self, owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pay beforehand for methods of texts that can make much out of little."""
        values = [*args, *kwargs.values()]
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            if any(isinstance(value, int) and value > MAX_PADDING for value in values):
                raise SecurityError("the template pads a text too far")
            self._meter.pay(len(owner) * (MAX_PADDING // 100 if name == "expandtabs" else 1))
        elif name == "replace" and len(values) >= 2 and all(isinstance(value, str) for value in values[:2]):
            text = cast("str", owner)
            self._meter.pay(text.count(values[0]) * len(values[1]) + len(text))
        elif name == "join" and values:
            self._price_join(len(owner), values[0])
        elif name in ("format", "format_map") and isinstance(owner, str):
            self._price_format(owner, values)
        elif name in ("translate", "maketrans"):
            raise SecurityError(f"{name} is not available to templates")

    def _price_format(self, form: str, values: Sequence[object]) -> None:
        if _WIDE_FORMAT.search(form):
            raise SecurityError("the template pads a text too far")
        for _ in range(max(1, form.count("{"))):  # each place may show each value
            self._meter.pay_for(list(values), as_text=True)

    def _price_join(self, separator: int, items: object) -> None:
        if isinstance(items, list | tuple):
            self._meter.pay(len(cast("Sequence[object]", items)) * separator)
            self._meter.pay_for(cast("object", items), as_text=True)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is paid for."""
        takes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._meter.step()
            values = list(args[1:] if takes_context else args)
            self._price_filter(name, values, [*values[1:], *kwargs.values()])
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return self._counted(cast("Iterator[Any]", result))
            return self._meter.pass_on(result)

        return metered

    def _price_filter(self, name: str, values: list[Any], rest: list[Any]) -> None:
        """Pay beforehand for filters that can make much out of little."""
        if name in _PADDING_FILTERS and any(isinstance(each, int) and each > MAX_PADDING for each in rest):
            raise SecurityError(f"the template gives {name} too large a number")
        if values and name in _TEXT_FILTERS and not isinstance(values[0], str):
            self._meter.pay_for(values[0], as_text=True)
        if name == "replace" and len(values) >= 3:
            text, old, new = (str(each) for each in values[:3])
            self._meter.pay(text.count(old) * len(new) + len(text))
        elif name == "join" and values:
            self._price_join(max([0, *(_length(each) for each in rest)]), values[0])
        elif name == "indent" and values:
            width = max([4, *(each if isinstance(each, int) else _length(each) for each in rest)])
            self._meter.pay((str(values[0]).count("\n") + 1) * width)
        elif name == "tojson" and values:
            self._meter.pay_for(values[0], as_text=True)
        elif name == "format" and values:
            self._price_format(str(values[0]), rest)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """A lazy result of a filter, with a step and a price for each item that is taken out of it."""
        for item in items:
            self._meter.step()
            yield self._meter.pass_on(item)


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _rewrite(node: nodes.Node) -> None:
    """Meters in place of what makes text and lists, everywhere below ``node``."""
    for child in node.iter_child_nodes():
        _rewrite(child)
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _metered_node(value))
        elif isinstance(value, list):
            items = cast("list[Any]", value)
            items[:] = [_metered_node(each) if isinstance(each, nodes.Node) else each for each in items]
    if isinstance(node, nodes.Output):
        node.nodes = [each if isinstance(each, nodes.TemplateData) else _call("emit", [each]) for each in node.nodes]


def _metered_node(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _call("join_texts", node.nodes)
    is_stored = isinstance(node, nodes.Tuple) and node.ctx != "load"  # for a, b in ...
    if isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and not is_stored:
        return _call("paid", [node])
    return node


def _is_small_power(base: object, exponent: object) -> bool:
    if not isinstance(base, int) or not isinstance(exponent, int):
        return True
    return base.bit_length() * exponent <= MAX_INTEGER_BITS


def _length(value: object) -> int:
    if isinstance(value, Undefined):
        return 0
    if isinstance(value, str | bytes | list | tuple | dict):
        return len(cast("Sequence[object]", value))
    return 32


def _size(value: object, depth: int) -> int:
    """Characters and items in plain data, about."""
    if isinstance(value, str):
        return len(value)
    if depth and isinstance(value, dict):
        pairs = cast("dict[object, object]", value)
        return len(pairs) + sum(_size(key, 0) + _size(each, depth - 1) for key, each in pairs.items())
    if depth and isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        return len(items) + sum(_size(each, depth - 1) for each in items)
    return 1


def _raise_exception(message: object) -> str:
    raise TemplateRefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:200])


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

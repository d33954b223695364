"""Nothing accepted is ignored: every field that a user or a process border can set is read by the part that has to
honour it. Turns red when a field is added without its reader, or when its last reader goes.

A reader is an attribute access of that name, or the name as a key of a table, so two classes with a field of the same
name can hide one another; the behaviour of each field is tested where it lives.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo import messages
from octavo.config import sections
from octavo.config.args import EngineArgs
from octavo.errors import InvalidRequestError
from octavo.sampling_params import SamplingParams

PACKAGE = Path(__file__).parents[2] / "octavo"

REFUSED_SAMPLING: dict[str, Any] = {"structured_outputs": {"json": {}}}
"""Fields of SamplingParams that say so when somebody sets them."""

FOR_OTHERS = {"extra_args"}
"""Handed to logits processors of users as it is; nothing of ours reads it."""

RESERVED = {
    "lora_slot": "adapters",
    "num_draft_tokens": "speculative decoding",
    "copies": "the host tier of the KV cache",
    "finished_copies": "the host tier of the KV cache",
    "src_block_id": "the host tier of the KV cache",
    "dst_block_id": "the host tier of the KV cache",
}
"""Fields whose reader is a later step of docs/architecture.md, and which one. Their values stay the default."""


def sources(*parts: str, without: tuple[str, ...] = ()) -> list[Path]:
    """Python files of the named files and packages of octavo."""
    found: list[Path] = []
    for part in parts:
        path = PACKAGE / part
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [path for path in found if not any(path.is_relative_to(PACKAGE / part) for part in without)]


def attributes_read(paths: Iterable[Path]) -> set[str]:
    """Names of all attributes whose value some code in ``paths`` takes, and all strings that may name one."""
    return set().union(*(attributes_read_in(path) for path in paths))


@functools.cache
def attributes_read_in(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)


def struct_fields(cls: type) -> set[str]:
    names = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return names or set(cls.__struct_fields__)  # type: ignore[attr-defined]


def test_every_sampling_parameter_is_honoured_or_refused() -> None:
    read = attributes_read(sources("frontend"))
    if "stop_strings" in read:
        read.add("stop")  # the property that gives both spellings of ``stop`` as a list
    assert struct_fields(SamplingParams) - read - set(REFUSED_SAMPLING) == set()


@pytest.mark.parametrize("field", sorted(REFUSED_SAMPLING))
def test_refused_sampling_parameters_say_so(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: REFUSED_SAMPLING[field]})


def test_every_resolved_sampling_field_has_a_reader_in_the_core_or_the_worker() -> None:
    read = attributes_read(sources("kv_cache", "scheduler", "worker", "sampling"))
    assert struct_fields(messages.ResolvedSampling) - read - FOR_OTHERS == set()


def test_every_engine_argument_is_resolved() -> None:
    read = attributes_read(sources("config/resolve.py", "config/pooling.py", "engine", "checkpoint", "llm.py", "cli"))
    assert struct_fields(EngineArgs) - read == set()


SECTIONS = [cls for cls in vars(sections).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_reader_outside_the_configuration(section: type) -> None:
    read = attributes_read(sources(".", without=("config",)))
    assert struct_fields(section) - read - set(RESERVED) == set()


MESSAGES = [
    cls
    for cls in vars(messages).values()
    if isinstance(cls, type) and issubclass(cls, msgspec.Struct) and cls.__module__ == messages.__name__
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_field_of_a_message_has_a_reader(message: type) -> None:
    read = attributes_read(sources(".", without=("messages.py",)))
    assert struct_fields(message) - read - set(RESERVED) == set()


def test_nothing_writes_a_reserved_field_of_a_message() -> None:
    # Otherwise it has a writer and no reader, and what it says is lost.
    written = {
        keyword.arg
        for path in sources(".", without=("config",))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    }
    assert written & set(RESERVED) == set()


def test_a_field_without_a_reader_is_found(tmp_path: Path) -> None:
    source = tmp_path / "reader.py"
    source.write_text("def f(config):\n    config.written = 1\n    return config.max_tokens, {'seed': 0}\n")
    assert attributes_read([source]) == {"max_tokens", "seed"}

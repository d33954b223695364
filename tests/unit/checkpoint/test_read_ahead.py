"""The system is asked for the files that will be loaded, in order and not for all of a huge model; never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.checkpoint import read_ahead as module
from octavo.checkpoint.read_ahead import read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and bytes that were asked for."""
    calls: list[tuple[str, int]] = []

    def note(descriptor: int, _start: int, num_bytes: int, _advice: int) -> None:
        calls.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", note)
    monkeypatch.setattr(module, "MAX_BYTES", 25)
    return calls


def ask(path: Path, load_format: str) -> None:
    thread = read_ahead(str(path), load_format)
    if thread is not None:
        thread.join()


def test_what_is_asked_for(asked: list[tuple[str, int]], tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.safetensors", "a.safetensors", "c.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 10)
    ask(tmp_path / "a-00002-of-00002.gguf", "gguf")
    assert asked == [("a-00001-of-00002.gguf", 10), ("a-00002-of-00002.gguf", 10)]
    asked.clear()
    ask(tmp_path, "safetensors")
    assert asked == [("a.safetensors", 10), ("b.safetensors", 10), ("c.safetensors", 5)]
    asked.clear()
    ask(tmp_path, "dummy")
    ask(tmp_path, "pt")
    ask(tmp_path / "none.gguf", "gguf")
    ask(tmp_path / "a-00001-of-00003.gguf", "gguf")
    assert asked == []

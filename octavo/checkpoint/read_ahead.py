"""Ask the system to fetch weights from disk while the engine is busy with something else: importing torch, mostly.

A hint: where it cannot be given, or the files are in memory already, nothing happens. Knows names of files only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from octavo.checkpoint.gguf_parts import parts_of
from octavo.errors import CheckpointError

MAX_BYTES = 8 << 30
"""As much as a disk gives in the seconds of an import; more could push out what is needed first."""
_PATTERNS = {"safetensors": "*.safetensors", "pt": "pytorch_model*.bin"}


def read_ahead(path: str, load_format: str) -> threading.Thread | None:
    """Begin; does not wait.

    Args:
        path: Of a located model.
        load_format: As resolved. Of formats that are not known, nothing is read.

    Returns:
        The thread that asks (a system may not answer before it has begun to read); None where there is nothing to do.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    files: list[Path] = []
    if load_format == "gguf":
        with suppress(CheckpointError):  # whoever loads it says so
            files = parts_of(Path(path))
    elif load_format in _PATTERNS:
        files = sorted(Path(path).glob(_PATTERNS[load_format]))
    if not files:
        return None
    thread = threading.Thread(target=_ask, args=(files,), name="octavo-read-ahead", daemon=True)
    thread.start()
    return thread


def _ask(files: Iterable[Path]) -> None:
    left = MAX_BYTES
    for file in files:
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                num_bytes = min(left, os.fstat(descriptor).st_size)
                os.posix_fadvise(descriptor, 0, num_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
            left -= num_bytes
        if left <= 0:
            return

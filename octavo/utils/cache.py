"""Where this user's things that can be made again are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder for one kind of thing, in the user's cache; a new one of this process where that cannot be written.

    The new one is private: under a name that can be foretold, somebody else could leave things for us to load.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "octavo" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return _own_folder(name)
    return folder if os.access(folder, os.W_OK) else _own_folder(name)


def _own_folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"octavo-{name}-"))

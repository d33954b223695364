"""Compile the C files of this folder once for this machine, and keep the result.

Compiling here rather than shipping binaries lets the compiler use every instruction of this very processor, and takes
a few seconds once. Without a C compiler the engine works all the same, by torch's operators alone, slower.
Knows nothing of what the functions do; see ``__init__.py`` for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from octavo.utils.cache import cache_folder
from octavo.utils.compiler import find_compiler

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.c"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math",
    "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math",
)  # fmt: skip
_TIMEOUT_S = 120


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None; and where it is or why there is none, in words.

    torch must be imported before, so that both use one OpenMP runtime and one set of threads.
    """
    compiler, reason = find_compiler()
    if compiler is None:
        return None, reason
    texts = [path.read_text() for path in (*_SOURCES, *_HEADERS)]
    key = hashlib.sha256("\0".join((*texts, *_FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    library = cache_folder("kernels") / f"octavo_cpu-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, library)
        return ctypes.CDLL(str(library)), str(library)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"compiling the CPU kernels with {compiler} failed: {detail.strip()[:500]}"


def _compile(compiler: str, library: Path) -> None:
    logger.info("compiling the CPU kernels for this machine, once, into %s", library.parent)
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        # One compiler per file, all at once.
        jobs = [
            [compiler, *_FLAGS, "-c", "-o", str(o), str(source)] for o, source in zip(objects, _SOURCES, strict=True)
        ]
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(_call, jobs))
        # Under another name first: a process that starts meanwhile must not see half a file.
        linked = Path(folder) / library.name
        _call([compiler, *_FLAGS, "-shared", "-o", str(linked), *map(str, objects), "-lm"])
        os.replace(linked, library)


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

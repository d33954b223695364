"""Triton kernels of operators that also have a CPU path, one file each; their references stand in the files of
``kernels/`` that choose between the paths.

They import Triton, which a CPU-only installation may lack, so they are loaded by name at their first use on a GPU.
All are safe to capture in a CUDA graph: they allocate and launch, never synchronise, and read lengths and row lists
from device memory.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def gpu_kernels(name: str) -> ModuleType:
    """The module ``kernels/gpu/<name>.py``."""
    return importlib.import_module(f"octavo.kernels.gpu.{name}")

"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits inside.

On an H200 it takes 0.3 to 0.5 us off each kernel of a chain (2026-11-22). Every program of a kernel that is launched
so calls ``gdc_wait`` before it reads or writes anything but what was complete before the step's layers began (weights,
positions, block tables), and does so even if it has nothing to do: the kernel after it relies on all that came before
being complete. ``OCTAVO_KERNELS_PDL=0`` turns it off, to find a fault.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

MAX_ARRIVALS = 4096


@functools.cache
def has_pdl() -> bool:
    """Whether kernels may be launched early: Hopper or later, and not in the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("OCTAVO_KERNELS_PDL") == "0":
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def launch_options() -> dict[str, bool]:
    """Keyword arguments of a launch; the kernel's PDL parameter is ``has_pdl()``."""
    return {"launch_pdl": True} if has_pdl() else {}


def settle_names(*functions: Any) -> None:
    """Have Triton name functions that several kernels call: where they are defined, each behind those that it calls.

    A kernel's name on the disk holds the constants of a function that it calls only if that has been named before
    (Triton 3.6 and 3.7). So it would be compiled again wherever another of its callers happened to run first.
    """
    for function in functions:
        getattr(function, "cache_key", None)  # the interpreter's have none


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """``[MAX_ARRIVALS]`` int32 counters of programs that put a result together: 0 between two kernels.

    Shared by all of them, which follow one another in one stream. Made at the first use, which must not be while a
    graph is recorded: the graph would own it.
    """
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)

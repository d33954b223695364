"""Memory that goes back to the system when it is dropped, for weights on their way into their final form."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python has no name for it yet."""


def transient(*shape: int) -> Tensor:
    """A float32 tensor in pages of its own.

    Not from malloc, because freeing a large piece there tells glibc to keep pieces up to that size for later: layer by
    layer that left holes of half a model's size.
    """
    size = math.prod(shape)
    pages = _map_pages(max(1, 4 * size))
    return torch.from_numpy(np.frombuffer(pages, np.float32, size)).view(shape)


def _map_pages(num_bytes: int) -> mmap.mmap:
    """Fresh memory; on Linux all of it at once and in huge pages, at a fraction of one page fault after the other."""
    if not sys.platform.startswith("linux"):
        return mmap.mmap(-1, num_bytes)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_WRITE):
        with suppress(OSError):  # a kernel without it
            pages.madvise(advice)
    return pages

"""Compile kernels side by side before the first of them runs.

Triton compiles a kernel where it is first launched, so the first start on a machine would do so one after the other:
some sixty kernels of a quarter of a second each. Here steps are rehearsed: what is not compiled is noted instead of
launched, then compiled on all cores. A start that finds its kernels in Triton's cache on disk rehearses one step only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime.jit import JITFunction

logger = logging.getLogger(__name__)

_ALLOCATIONS = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty})


class _Unlaunched:
    """Stands in Triton's table of compiled kernels while a rehearsal lasts, so that a repeated launch costs little."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        """Nothing."""

    def run(self, *_: object) -> None:
        """Nothing."""


class _ZeroedMemory(TorchFunctionMode):
    """New tensors are 0: kernels that are not launched write nothing, and an index must not be rubbish."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in _ALLOCATIONS else result


def compile_ahead(steps: Sequence[Callable[[], object]], num_threads: int) -> None:
    """Compile what ``steps`` launch, without launching it.

    Args:
        steps: Each is called once at most. What is not a Triton kernel runs, and so may a kernel that is compiled
            already; the others leave zeros. So a step must bear that, and whatever else it changes.
        num_threads: That compile. They share Python's lock for about a quarter of the work.
    """
    began_s = time.monotonic()
    first = _rehearse(steps[:1])
    if _compile(first, num_threads):
        others = _rehearse(steps[1:])
        logger.info("Compiling %d GPU kernels; Triton keeps them for later starts ...", len(first) + len(others))
        _compile(others, num_threads)
        logger.info("Compiling finished in %.1f secs", time.monotonic() - began_s)


def _rehearse(steps: Sequence[Callable[[], object]]) -> list[Callable[[], Any]]:
    """What compiles the kernels of these steps that are not yet."""
    with _noted_launches() as variants, _ZeroedMemory():
        for step in steps:
            step()
    return list(variants.values())


@contextmanager
def _noted_launches() -> Iterator[dict[Any, Callable[[], Any]]]:
    """In here a launch that would compile is noted, and nothing else happens."""
    variants: dict[Any, Callable[[], Any]] = {}
    # Triton's hook for this hands out a text, which leads to other names on the disk than those of later starts.
    do_compile = JITFunction._do_compile

    def note(kernel: JITFunction[Any], key: Any, *specialization: Any, **options: Any) -> _Unlaunched:
        kernel.cache_key  # noqa: B018 - makes it now: two threads must not
        variants[kernel, key] = partial(do_compile, kernel, key, *specialization, **options)
        _compiled_kernels(kernel)[key] = stand_in
        return stand_in

    stand_in = _Unlaunched()
    JITFunction._do_compile = note
    try:
        yield variants
    finally:
        JITFunction._do_compile = do_compile
        for kernel, key in variants:
            del _compiled_kernels(kernel)[key]


def _compiled_kernels(kernel: Any) -> dict[Any, Any]:
    """Those of the current GPU, by types and constants."""
    return kernel.device_caches[torch.cuda.current_device()][0]


def _compile(variants: Sequence[Callable[[], Any]], num_threads: int) -> bool:
    """Compile them, or read them from the disk. Returns whether any was not there."""
    is_cached: list[bool] = []

    def watch(*, cache_hit: bool, **_: Any) -> None:
        is_cached.append(cache_hit)

    before = knobs.compilation.listener

    def load(variant: Callable[[], Any]) -> None:
        _ = variant().run  # makes what launches it too: C code that a compiler translates

    knobs.compilation.listener = watch
    device = torch.cuda.current_device()
    try:
        with ThreadPoolExecutor(num_threads, "compile", initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            for _ in pool.map(load, variants):
                pass
    finally:
        knobs.compilation.listener = before
    return not all(is_cached)

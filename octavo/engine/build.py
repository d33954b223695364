"""From EngineArgs to a running EngineCore: find, resolve, load, size, warm up; each phase timed and told in the log.

Runs where the engine runs: in the caller's process or in ``engine/core_main.py``'s. Decides nothing itself: settings
are ``config/resolve.py``'s, memory is the worker's to count, names are the registries'.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.checkpoint.code import read_tokenizer_code
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model, locate_tokenizer
from octavo.checkpoint.pooling_reader import read_pooling
from octavo.checkpoint.read_ahead import read_ahead
from octavo.config.args import EngineArgs
from octavo.config.engine import Decision, EngineConfig
from octavo.config.kv_cache_size import KVCacheSize, size_kv_cache
from octavo.config.resolve import resolve
from octavo.device.openmp import limit_spinning
from octavo.device.registry import find_device_type, probe_hardware
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.executor.executor import Executor, MemoryReport
from octavo.executor.registry import make_executor
from octavo.messages import CoreOutput, EngineLoading, EngineReady, EngineStarting
from octavo.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
GIB = 2**30
ATTENTION_REGISTRY = "octavo.attention.registry"
"""By name, because it imports torch, which takes a second that a frontend's tokenizer can use (EngineStarting)."""
PROFILER = "octavo.engine.profiler"
"""By name for the same reason."""
CODE_CONFIG = "octavo.models.transformers_code:state_config"
CODE_TOKENIZER = "octavo.models.transformers_tokenizer:rebuild_tokenizer"
"""What runs code of a checkpoint: imported only when the user trusts it, and there is some."""
PHASE_WORDS = {
    "resolve": "reading the model's settings",
    "import": "starting the device",
    "load": "loading the weights",
    "kv cache": "making the KV cache",
    "warm-up": "warming up",
}


@dataclass(slots=True)
class Phases:
    """Seconds of each phase of the start, in order."""

    tell: Callable[[str], None]
    """Called with each phase that begins, in words."""
    started_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        self.tell(PHASE_WORDS[name])
        begin_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin_s

    @property
    def total_s(self) -> float:
        return time.monotonic() - self.started_s


def build(args: EngineArgs, emit: Callable[[int, CoreOutput], None]) -> tuple[EngineCore, EngineReady]:
    """Make an engine that is ready to work.

    Args:
        args: What the user asked for.
        emit: Where the core's messages go; gets an EngineStarting before the weights are loaded.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: The settings, the model or its files will not do.
    """
    phases = Phases(lambda words: emit(0, EngineLoading(words)))
    non_default = args.non_default()
    if non_default:
        logger.info("non-default args: %s", non_default)
    with phases.phase("resolve"):
        config, decisions = _resolve(args)
    for decision in decisions:
        logger.info("%s = %s (%s)", decision.field, decision.value, decision.reason)
    emit(0, EngineStarting(config, decisions))
    read_ahead(config.load.path, config.load.load_format)
    if config.device.device_type == "cpu":
        limit_spinning(os.environ)
    with phases.phase("import"):
        executor = make_executor(config)
    try:
        with phases.phase("load"):
            report = executor.start()
        size = _size(args, config, report, executor, phases)
    except BaseException:
        executor.shutdown()
        raise
    config = size.config
    decisions = [
        *decisions,
        Decision("attention_backend", report.attention_backend, report.attention_reason),
        *size.decisions,
    ]
    scheduler = Scheduler(config.scheduler, config.cache, report.kv_spec, size.num_blocks)
    core = EngineCore(scheduler, executor, config.device.depth, emit)
    profiler = import_module(PROFILER).Profiler(args.torch_profiler_dir)
    core.add_call("start_profile", profiler.start)
    core.add_call("stop_profile", profiler.stop)
    ready = EngineReady(
        config=config,
        decisions=decisions,
        num_blocks=size.num_blocks,
        num_kv_tokens=size.num_tokens,
        max_concurrency=size.max_concurrency,
        weights_bytes=report.weights_bytes,
        activation_bytes=report.activation_bytes,
        available_kv_bytes=report.available_kv_bytes,
        attention_backend=report.attention_backend,
        phase_seconds=phases.seconds,
        total_seconds=phases.total_s,
    )
    logger.info(
        "init engine (%s) took %.2f s",
        ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.seconds.items()),
        ready.total_seconds,
    )
    return core, ready


def _resolve(args: EngineArgs) -> tuple[EngineConfig, list[Decision]]:
    trusts = args.trust_remote_code
    located = locate_model(args.model, args.revision, args.download_dir, with_code=trusts)
    if args.tokenizer is not None:
        found = locate_tokenizer(args.tokenizer, download_dir=args.download_dir, with_code=trusts)
        args = replace(args, tokenizer=found)
    run_code = partial(_run, CODE_CONFIG, model_impl=args.model_impl) if trusts else None
    model = read_model_config(located, args.hf_overrides, run_code)
    if trusts and not args.skip_tokenizer_init:
        folder = Path(args.tokenizer or located.path)
        if folder.is_dir() and not (folder / "tokenizer.json").exists():
            code = read_tokenizer_code(folder)
            args = args if code is None else replace(args, tokenizer=_run(CODE_TOKENIZER, code))
    hardware = probe_hardware(find_device_type() if args.device == "auto" else args.device)
    return resolve(args, located, model, hardware, read_pooling(located, model))


def _run(function: str, *arguments: Any, **options: Any) -> Any:
    """Call what runs code of a checkpoint."""
    try:
        import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"trust_remote_code: code of a checkpoint needs transformers, which cannot be imported ({error}): "
            "pip install octavo[transformers]",
            param="trust_remote_code",
        ) from error
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(*arguments, **options)


def _size(
    args: EngineArgs, config: EngineConfig, report: MemoryReport, executor: Executor, phases: Phases
) -> KVCacheSize:
    """Size the cache, make it, run the model once; with the log lines that people know."""
    logger.info("Model loading took %.2f GiB memory and %.2f seconds", report.weights_bytes / GIB, report.load_seconds)
    logger.info(
        "Using %s attention backend out of potential backends: %s (%s)",
        report.attention_backend.upper(),
        import_module(ATTENTION_REGISTRY).BACKENDS.names(),
        report.attention_reason,
    )
    logger.info("Available KV cache memory: %.2f GiB", report.available_kv_bytes / GIB)
    size = size_kv_cache(args, config, report)
    for decision in size.decisions:
        logger.info("%s = %s (%s)", decision.field, decision.value, decision.reason)
    with phases.phase("kv cache"):
        executor.allocate(size.num_blocks)
    # The device is part of vLLM's wording; a CPU engine says it without.
    device = "" if config.device.device_type == "cpu" else "GPU "
    logger.info("%sKV cache size: %s tokens", device, f"{size.num_tokens:,}")
    logger.info(
        "Maximum concurrency for %s tokens per request: %.2fx",
        f"{size.config.scheduler.max_model_len:,}",
        size.max_concurrency,
    )
    with phases.phase("warm-up"):
        executor.warm_up()
    return size

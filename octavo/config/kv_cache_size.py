"""How large the KV cache becomes, once the weights are loaded and the worker has counted its memory.

The second half of ``resolve.py``, and like it pure: numbers in, numbers and ``Decision``s out. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from octavo.config.args import EngineArgs
from octavo.config.engine import Decision, EngineConfig
from octavo.errors import ConfigError
from octavo.utils.text import format_bytes, format_count, plural

GIB = 2**30
CPU_KV_CACHE_BYTES = 4 * GIB


class KVGeometry(Protocol):
    """``kv_spec.KVCacheSpec``, as far as it matters here."""

    @property
    def block_size(self) -> int: ...
    @property
    def bytes_per_block(self) -> int: ...
    def blocks_for_tokens(self, num_tokens: int) -> int: ...


class MemoryNumbers(Protocol):
    """``executor.executor.MemoryReport``, as far as it matters here."""

    @property
    def kv_spec(self) -> KVGeometry: ...
    @property
    def weights_bytes(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...
    @property
    def available_kv_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """The KV cache that was settled on."""

    num_blocks: int
    """Block 0, the null block, included."""
    num_tokens: int
    """That it can hold."""
    max_concurrency: float
    """Requests of full length that fit at once."""
    config: EngineConfig
    """With ``scheduler.max_model_len`` fitted when the user said ``auto``."""
    decisions: list[Decision]


def size_kv_cache(args: EngineArgs, config: EngineConfig, report: MemoryNumbers) -> KVCacheSize:
    """Number of KV cache blocks, and the context length where the user left it to memory.

    Raises:
        ConfigError: Not even one request of full length fits; names the largest length that does.
    """
    spec, notes = report.kv_spec, list[Decision]()
    if spec.bytes_per_block == 0:
        return _free_blocks(config, spec)
    per_block, wanted_len = spec.bytes_per_block, config.scheduler.max_model_len
    need_full = (spec.blocks_for_tokens(wanted_len) + 1) * per_block
    budget, why, flag = _kv_budget(args, config, report, need_full)
    num_blocks = budget // per_block
    usable = num_blocks - 1
    max_model_len = wanted_len
    if usable < spec.blocks_for_tokens(wanted_len):
        fits = _longest_that_fits(spec, usable, wanted_len)
        if args.max_model_len != "auto" or fits < 1:
            raise ConfigError(_too_small(config, report, budget, need_full, fits, flag), param="max_model_len")
        max_model_len = fits
        notes.append(
            Decision("max_model_len", format_count(fits), f"the longest that fits into {format_bytes(budget)} of cache")
        )
        config = replace(config, scheduler=replace(config.scheduler, max_model_len=fits))
    # In texts of full length: one with windows holds less than a block per block_size tokens and layer.
    in_full = -(-max_model_len // spec.block_size)
    num_tokens = usable * spec.block_size * in_full // spec.blocks_for_tokens(max_model_len)
    notes.append(
        Decision(
            "num_blocks",
            format_count(num_blocks),
            f"{format_bytes(num_blocks * per_block)} = {format_count(num_tokens)} tokens: {why}",
        )
    )
    return KVCacheSize(num_blocks, num_tokens, usable / spec.blocks_for_tokens(max_model_len), config, notes)


def _free_blocks(config: EngineConfig, spec: KVGeometry) -> KVCacheSize:
    """Blocks for a model that keeps nothing: the scheduler counts them, but they hold no memory."""
    limits = config.scheduler
    in_flight = limits.max_num_batched_tokens // spec.block_size + limits.max_num_seqs
    at_least = spec.blocks_for_tokens(limits.max_model_len)
    # A step's requests end with it, so those of the steps in flight and of the one being planned exist at once.
    usable = max(at_least, (config.device.depth + 1) * in_flight)
    reason = "an encoder keeps no keys and values: blocks count requests, and take no memory"
    return KVCacheSize(
        num_blocks=usable + 1,
        num_tokens=usable * spec.block_size,
        max_concurrency=usable / at_least,
        config=config,
        decisions=[Decision("num_blocks", format_count(usable + 1), reason)],
    )


def _kv_budget(args: EngineArgs, config: EngineConfig, report: MemoryNumbers, need_full: int) -> tuple[int, str, str]:
    """Bytes for the cache, why so many, and the flag that changes it."""
    available, per_block = report.available_kv_bytes, report.kv_spec.bytes_per_block
    if args.num_gpu_blocks_override is not None:
        asked, flag = args.num_gpu_blocks_override * per_block, "num_gpu_blocks_override"
    elif args.kv_cache_memory_bytes is not None:
        asked, flag = args.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    else:
        if config.device.device_type != "cpu":
            return available, "all that is free below the ceiling of gpu_memory_utilization", "gpu_memory_utilization"
        wanted = max(CPU_KV_CACHE_BYTES, need_full)
        if wanted <= available:
            return wanted, "default of a CPU; --kv-cache-memory-bytes changes it", "kv_cache_memory_bytes"
        return available, "all that is free below the ceiling of gpu_memory_utilization", "gpu_memory_utilization"
    if asked > available:
        raise ConfigError(
            f"{flag} asks for {format_bytes(asked)} of KV cache, but only {format_bytes(available)} are free beside "
            f"{format_bytes(report.weights_bytes)} of weights and {format_bytes(report.activation_bytes)} of working "
            "memory: ask for less, or free memory",
            param=flag,
        )
    return asked, f"asked for by {flag}", flag


def _longest_that_fits(spec: KVGeometry, usable_blocks: int, upper: int) -> int:
    """Most tokens of one request whose blocks number at most ``usable_blocks``; 0 when none."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if spec.blocks_for_tokens(middle) <= usable_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _too_small(config: EngineConfig, report: MemoryNumbers, budget: int, need_full: int, fits: int, flag: str) -> str:
    wanted = config.scheduler.max_model_len
    spelled = "--" + flag.replace("_", "-")
    remedies = [f"--max-model-len {fits} (or auto)"] if fits > 0 else []
    remedies.append(
        f"a higher {spelled}" if flag != "gpu_memory_utilization" else f"free memory, or a higher {spelled}"
    )
    if config.cache.kv_cache_dtype == "float32":
        remedies.append("--kv-cache-dtype bfloat16, which halves it")
    largest = f"The longest that fits is {plural(fits, 'token')}. " if fits > 0 else "Not even one block fits. "
    return (
        f"the KV cache has room for {format_bytes(max(budget, 0))}, but one request of max_model_len "
        f"({format_count(wanted)} tokens) needs {format_bytes(need_full)} (weights take "
        f"{format_bytes(report.weights_bytes)}, working memory {format_bytes(report.activation_bytes)}). "
        f"{largest}Use {'; '.join(remedies)}."
    )

"""Settings for tests of the control half, with every value overridable."""

from __future__ import annotations

from octavo.config.sections import CacheConfig, SchedulerConfig
from octavo.kv_spec import KVCacheSpec, KVGroupSpec, KVKind


def cache_config(block_size: int = 16, **changes: object) -> CacheConfig:
    """A CacheConfig for tests."""
    values: dict[str, object] = {
        "block_size": block_size,
        "kv_cache_dtype": "float32",
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256",
        "memory_utilization": 0.9,
        "kv_cache_memory_bytes": None,
        "num_blocks_override": None,
    }
    return CacheConfig(**(values | changes))  # type: ignore[arg-type]


def scheduler_config(**changes: object) -> SchedulerConfig:
    """A SchedulerConfig for tests."""
    values: dict[str, object] = {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "enable_chunked_prefill": True,
        "long_prefill_token_threshold": 0,
        "policy": "fcfs",
        "max_num_queued_reqs": 1000,
        "max_num_queued_tokens": 1_000_000,
    }
    return SchedulerConfig(**(values | changes))  # type: ignore[arg-type]


def kv_spec(block_size: int = 16, *windows: int | None) -> KVCacheSpec:
    """One KV group per window; None is full attention. No windows: one full group."""
    return KVCacheSpec(
        tuple(
            KVGroupSpec(
                KVKind.FULL if window is None else KVKind.SLIDING_WINDOW,
                layer_indices=(index,),
                num_kv_heads=1,
                head_dim=1,
                bytes_per_element=4,
                sliding_window=window,
            )
            for index, window in enumerate(windows or (None,))
        ),
        block_size,
    )

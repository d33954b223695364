"""MemoryReport: what a worker found after loading. Plain data without torch: executors and engine read it too."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.kv_spec import KVCacheSpec


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a worker found after loading: the ledger from which the KV cache is sized. Bytes."""

    kv_spec: KVCacheSpec
    weights_bytes: int
    activation_bytes: int
    """Upper bound for the largest step."""
    available_kv_bytes: int
    """What may become KV cache, after ceiling, weights, activations and reserve."""
    attention_backend: str
    attention_reason: str
    load_seconds: float

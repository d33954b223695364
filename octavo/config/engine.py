"""EngineConfig: the frozen bundle of sections that ``resolve()`` returns, and the Decisions that explain it."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config.model import ModelConfig
from octavo.config.sections import (
    CacheConfig,
    DeviceConfig,
    FrontendConfig,
    LoadConfig,
    ParallelConfig,
    PoolingConfig,
    SchedulerConfig,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """One setting that was not simply taken over from the user, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything resolved. Held whole only by engine, executor, worker and server."""

    model: ModelConfig
    load: LoadConfig
    device: DeviceConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    frontend: FrontendConfig
    pooling: PoolingConfig | None = None
    """None: the engine generates."""

"""A small model, a machine, and the numbers that a worker would report, all as plain data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from octavo.config.hardware import Hardware
from octavo.config.model import ModelConfig, RopeConfig
from octavo.kv_spec import KVCacheSpec, KVGroupSpec, KVKind

GIB = 2**30


def make_model(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope": RopeConfig(), "dtype": "bfloat16",
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def make_hardware(device_type: str = "cpu", gib: int = 32, **changes: Any) -> Hardware:
    return Hardware(device_type, "Test device", gib * GIB, gib * GIB, **{"num_threads": 8, **changes})


@pytest.fixture
def located() -> Any:
    return SimpleNamespace(name="tiny", path="/models/tiny", format="safetensors")


def make_report(available_bytes: int, block_size: int = 16) -> Any:
    """Of a model with 2 layers x 2 heads x 16 dimensions in float32: 512 bytes per token, 8 KiB per block of 16."""
    spec = KVCacheSpec((KVGroupSpec(KVKind.FULL, (0, 1), 2, 16, 4),), block_size)
    return SimpleNamespace(
        kv_spec=spec, weights_bytes=2**20, activation_bytes=2**16, available_kv_bytes=available_bytes
    )

"""Names of attention backends: those that users bring along mean something here. Red when one is lost."""

from __future__ import annotations

import pytest

from octavo.attention.registry import BACKENDS
from octavo.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("triton", "TRITON_ATTN"),
        ("flash_attn", "FLASH_ATTN"),
        ("flash-attn", "FLASH_ATTN"),
        ("flex", "FLEX_ATTENTION"),
        ("torch", "TORCH_SDPA"),
        ("flashinfer", "FLASHINFER"),
        ("xformers", "XFORMERS"),
        ("FLASH_ATTN_VLLM_V1", "FLASH_ATTN"),
        ("TRITON_ATTN_VLLM_V1", "TRITON_ATTN"),
        ("FLASHINFER_VLLM_V1", "FLASHINFER"),
        ("TORCH_SDPA_VLLM_V1", "TORCH_SDPA"),
    ],
)
def test_spellings(given: str, ours: str) -> None:
    assert BACKENDS.resolve_name(given) == ours
    assert BACKENDS.knows(given)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'NOPE' is not known. Available: CPU_PAGED, TORCH_SDPA, "):
        BACKENDS.load("nope")

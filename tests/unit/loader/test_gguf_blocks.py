"""GGUF blocks decoded by the compiled kernel as by the ``gguf`` package. Red when a bit moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.checkpoint.gguf_file import QUANT_TYPES, GGUFTensor
from octavo.kernels.native import native_kernels, native_status
from octavo.loader.gguf_blocks import COMPILED, dequantize, dequantize_ref

QUANTISED = {name: (values, size) for name, values, size in QUANT_TYPES.values() if name in COMPILED}
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
"""Where a block has 16-bit floats; at its beginning in the others."""


def make_blocks(name: str) -> tuple[memoryview, GGUFTensor]:
    """Random blocks, their scales large, tiny (subnormal), zero and negative, but finite."""
    values, size = QUANTISED[name]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (96, size), dtype=np.uint8)
    scales = np.concatenate([generator.normal(0, 10.0**power, 16) for power in (2, 0, -3, -6, -8, -30)])
    for place in HALVES.get(name, (0,)):
        generator.shuffle(scales)
        blocks[:, place : place + 2] = scales.astype("<f2")[:, None].view(np.uint8)
    tensor = GGUFTensor("t", (12, 8 * values), name, values, size, 0, blocks.size)
    return memoryview(blocks).cast("B"), tensor


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.skipif(native_kernels() is None, reason=native_status())
def test_blocks_are_decoded_as_the_gguf_package_does(name: str) -> None:
    raw, tensor = make_blocks(name)
    expected = dequantize_ref(raw, tensor)
    assert expected.isfinite().all()
    assert torch.equal(dequantize(raw, tensor, torch.empty), expected)


def test_without_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, tensor = make_blocks("Q4_1")
    expected = dequantize_ref(raw, tensor)
    monkeypatch.setattr("octavo.loader.gguf_blocks.native_kernels", lambda: None)
    assert torch.equal(dequantize(raw, tensor, torch.empty), expected)
    assert expected.shape == (12 * 8 * 32,)

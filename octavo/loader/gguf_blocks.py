"""Quantised blocks of GGUF files to float32: by the compiled kernel, else by the ``gguf`` package, its reference.

The package takes thirty times as long, and half a second to import: where there is a C compiler it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from octavo.checkpoint.gguf_file import QUANT_TYPES, GGUFTensor
from octavo.kernels.native import native_kernels

COMPILED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
"""Types that gguf_blocks.c decodes; the package does the others."""
_TYPE_IDS = {name: number for number, (name, _, _) in QUANT_TYPES.items() if name in COMPILED}


def dequantize(raw: memoryview, tensor: GGUFTensor, make_out: Callable[[int], Tensor]) -> Tensor:
    """Whole blocks of ``tensor``, one row after the other, to ``[values]`` float32.

    Args:
        raw: The blocks, in writable memory that nobody writes to (torch refuses other).
        tensor: Whose they are.
        make_out: Gives the memory for so many values; not called where the package decodes.
    """
    num_blocks, rest = divmod(len(raw), tensor.bytes_per_block)
    assert rest == 0, "blocks never cross rows"
    native = native_kernels()
    if native is None or tensor.quant_type not in COMPILED:
        return dequantize_ref(raw, tensor)
    out = make_out(num_blocks * tensor.values_per_block)
    native.dequantize(torch.frombuffer(raw, dtype=torch.uint8), _TYPE_IDS[tensor.quant_type], num_blocks, out)
    return out


def dequantize_ref(raw: bytes | memoryview, tensor: GGUFTensor) -> Tensor:
    """As ``dequantize``, by the ``gguf`` package."""
    from gguf import GGMLQuantizationType, quants

    rows = np.frombuffer(raw, np.uint8).reshape(-1, tensor.row_bytes)
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[tensor.quant_type])).view(-1)

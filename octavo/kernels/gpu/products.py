"""What kernels of several products share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(acc, x, w, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """``acc += x w^T``, or transposed: few rows are then the narrow side of the tensor core's tile."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc

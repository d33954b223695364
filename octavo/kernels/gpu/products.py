"""What kernels of several products share: multiplying a tile, and the gated activations behind gate and up."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.launch import settle_names

PLAIN = tl.constexpr(-1)
SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
CLAMPED_SWIGLU = tl.constexpr(2)
ACTIVATIONS = {None: -1, "silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}
"""What kernels know each of them by."""


@triton.jit
def multiply(acc, x, w, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """``acc += x w^T``, or transposed: few rows are then the narrow side of the tensor core's tile."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def act(gate, ACT: tl.constexpr):
    """The activation of a float32 gate: SILU or GELU_TANH."""
    if ACT == GELU_TANH:
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        result = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        result = gate * tl.sigmoid(gate)
    return result


@triton.jit
def activate(gate, up, ACT: tl.constexpr, dtype: tl.constexpr):
    """``act(gate) * up`` of float32 sums, with the roundings to ``dtype`` that separate launches have."""
    gate = act(gate.to(dtype).to(tl.float32), ACT)
    return gate.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)


settle_names(act, activate)

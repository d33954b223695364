"""The fused Triton operators against plain torch: norms, rotation with cache write, gated activations.

Runs on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``); skipped where there is neither.
Red when a kernel reads a wrong row, head, pair or position, rounds elsewhere than its reference, or writes a slot that
it must not.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.kernels.activation import gelu_tanh_and_mul_ref, silu_and_mul_ref
from octavo.kernels.gpu import activation, norm, rope
from octavo.kernels.norm import add_rms_norm_ref, rms_norm_ref
from octavo.kernels.rope import norm_rotate_write_ref

# Triton 3.6's interpreter on NumPy 2; a sigmoid whose exponential overflows is 0, as it should be.
pytestmark = [
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
# One rounding step of the dtype may fall the other way: sums run in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The interpreter cuts bfloat16 off instead of rounding (Triton 3.6).
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else list(TOLERANCE)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 4096)], ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, is_wide: bool) -> None:
    """``is_wide``: a weight in float32, as of Gemma, which is applied before the only rounding."""
    torch.manual_seed(0)
    # Rows of a wider tensor: strides must be honoured.
    residual = torch.randn(shape[0], shape[1] + 32, device=DEVICE).to(dtype)[:, : shape[1]]
    delta = torch.randn(shape, device=DEVICE).to(dtype)
    weight = (torch.rand(shape[1], device=DEVICE) + 0.5).to(torch.float32 if is_wide else dtype)
    close(norm.rms_norm(residual, weight, 1e-5), rms_norm_ref(residual, weight, 1e-5))
    expected_residual = residual.clone()
    expected = add_rms_norm_ref(expected_residual, delta, weight, 1e-5)
    close(norm.add_rms_norm(residual, delta, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96), (3, 3072)], ids=str)
def test_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = 4 * torch.randn(shape[0], 2 * shape[1], device=DEVICE).to(dtype)
    close(activation.gated(gate_up, is_gelu=False), silu_and_mul_ref(gate_up))
    close(activation.gated(gate_up, is_gelu=True), gelu_tanh_and_mul_ref(gate_up))


def cache_views(layout: str, page: int, groups: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The whole cache, full of NaN, and its key and value views ``[N, P, G, D]``."""
    if layout == "heads outside":
        cache = torch.full((4, 2, groups, page, size), float("nan"), dtype=dtype, device=DEVICE)
        return cache, cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)
    cache = torch.full((4, page, 2, groups, size), float("nan"), dtype=dtype, device=DEVICE)
    return cache, cache[:, :, 0], cache[:, :, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["heads outside", "tokens outside"])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "rotary_dim", "has_norm"),
    [(4, 2, 64, 64, False), (3, 1, 80, 80, True), (6, 3, 32, 16, True), (2, 2, 128, 128, True), (4, 2, 32, 0, False)],
)
def test_norm_rotate_write(
    heads: int, groups: int, size: int, rotary_dim: int, has_norm: bool, layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    page, tokens, max_positions = 16, 5, 40
    qkv = torch.randn(tokens, (heads + 2 * groups) * size, device=DEVICE).to(dtype)
    angles = torch.rand(max_positions, rotary_dim // 2, device=DEVICE) * 6
    table = torch.polar(torch.ones_like(angles) * 1.1, angles)
    positions = torch.tensor([39, 0, 7, 8, 3], device=DEVICE)
    slots = torch.tensor([page * 3 + 15, 0, -1, page, page * 2 + 5], device=DEVICE)
    norms = None
    if has_norm:
        # Weights in float32 in one case.
        weights = (torch.rand(2, size, device=DEVICE) + 0.5).to(torch.float32 if size == 128 else dtype)
        norms = (weights[0], weights[1], 1e-6)
    expected_qkv = qkv.clone()
    expected_cache, *expected_views = cache_views(layout, page, groups, size, dtype)
    norm_rotate_write_ref(expected_qkv, heads, groups, norms, table, positions, *expected_views, slots)
    cache, *views = cache_views(layout, page, groups, size, dtype)
    rope.norm_rotate_write(qkv, heads, groups, norms, torch.view_as_real(table), positions, *views, slots)
    close(qkv, expected_qkv)
    assert torch.equal(cache.isnan(), expected_cache.isnan()), "other slots than those of the step were written"
    close(cache.nan_to_num(), expected_cache.nan_to_num())

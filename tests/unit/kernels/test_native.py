"""Each compiled CPU kernel against its reference in plain torch.

Red when: a kernel, its packing, its tails (sizes that no vector divides) or its strides are wrong, or when the compiled
library stops building. Where there is no C compiler the kernels are not used at all and there is nothing to compare.
"""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.activation import gelu_tanh_and_mul, gelu_tanh_and_mul_ref, silu_and_mul, silu_and_mul_ref
from octavo.kernels.native import native_kernels, native_status
from octavo.kernels.native.build import load_library
from octavo.kernels.norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from octavo.kernels.rope import interleave_order, rotate, rotate_ref
from octavo.quantization.int8 import linear_int8_ref, quantize_weight

needs_native = pytest.mark.skipif(native_kernels() is None, reason=native_status())


@needs_native
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 70, 300])
@pytest.mark.parametrize(("size", "outputs"), [(576, 96), (48, 37), (30, 9), (1000, 4), (17, 1)])
def test_linear_int8(tokens, size, outputs):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2 * size, generator=generator)[:, :size]  # rows lie apart
    x[0] *= 1e3
    weight, scale = quantize_weight(torch.randn(outputs, size, generator=generator), 127)
    bias = torch.randn(outputs, generator=generator)
    native = native_kernels()
    panels = native.pack_int8(weight)
    for b in (None, bias):
        expected = linear_int8_ref(x, weight, scale, b)
        size_of_sums = x.norm(dim=1)[:, None] * (weight * scale[:, None]).norm(dim=1)
        error = (native.linear_int8(x, panels, scale, b) - expected).abs() / (size_of_sums + 1e-3 * expected.abs())
        assert error.max() < 1e-4


@needs_native
def test_linear_int8_of_a_row_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    native = native_kernels()
    x = torch.randn(33, 96, generator=generator)
    weight, scale = quantize_weight(torch.randn(50, 96, generator=generator), 127)
    panels = native.pack_int8(weight)
    together = native.linear_int8(x, panels, scale, None)
    alone = torch.cat([native.linear_int8(x[i : i + 1], panels, scale, None) for i in range(33)])
    assert torch.equal(together, alone)


@needs_native
def test_linear_int8_never_overflows():
    """The largest sums that inputs and weights can give, at a width where 16-bit inputs would not fit."""
    native = native_kernels()
    weight = torch.full((4, 20000), 127, dtype=torch.int8)
    got = native.linear_int8(torch.ones(1, 20000), native.pack_int8(weight), torch.full((4,), 1 / 127), None)
    torch.testing.assert_close(got, torch.full((1, 4), 20000.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (200, 576)])
def test_rms_norm(shape):
    x, weight = torch.randn(shape), torch.randn(shape[1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
    residual, delta = torch.randn(shape), torch.randn(shape)
    residual_ref = residual.clone()
    expected = add_rms_norm_ref(residual_ref, delta, weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(residual, delta, weight, 1e-5), expected)
    torch.testing.assert_close(residual, residual_ref)
    heads = torch.randn(5, 6, 32)[:, 1:4]  # not contiguous, as the heads of a fused projection
    torch.testing.assert_close(rms_norm(heads, torch.ones(32), 1e-6), rms_norm_ref(heads, torch.ones(32), 1e-6))


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_activations(scale):
    gate_up = torch.randn(9, 2 * 77) * scale
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    expected = silu_and_mul_ref(gate_up)
    torch.testing.assert_close(silu_and_mul(gate_up.clone()), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(gelu_tanh_and_mul(gate_up.clone()), gelu_tanh_and_mul_ref(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_rotate(dtype, rotary_dim):
    fused = torch.randn(11, 9, 32).to(dtype)
    before = fused.clone()
    rotation = torch.polar(torch.ones(11, rotary_dim // 2), torch.randn(11, rotary_dim // 2))
    expected = fused[:, :6].clone()
    rotate_ref(expected, rotation)
    rotate(fused[:, :6], rotation)
    torch.testing.assert_close(fused[:, :6], expected)
    assert torch.equal(fused[:, 6:], before[:, 6:]), "values are not rotated"


def test_interleaved_rotation_equals_the_half_split_one():
    """The layout of Hugging Face checkpoints: dimension i turns with i + R / 2."""
    order = interleave_order(16, 8)
    x = torch.randn(3, 2, 16)
    angles = torch.randn(3, 4)
    stored = x[..., order].clone()
    rotate(stored, torch.polar(torch.ones_like(angles), angles))
    first, second = x[..., :4], x[..., 4:8]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 8:]), dim=-1)
    torch.testing.assert_close(stored, expected[..., order])


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    load_library.cache_clear()
    monkeypatch.setenv("PATH", "")
    try:
        library, reason = load_library()
    finally:
        load_library.cache_clear()
    assert library is None
    assert "compiler" in reason


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    load_library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        library, reason = load_library()
    finally:
        load_library.cache_clear()
    assert library is None
    assert "no such option" in reason
    assert not list((tmp_path / "octavo" / "kernels").glob("*.so"))

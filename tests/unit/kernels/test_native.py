"""Each compiled CPU kernel against its reference in plain torch.

Red when: a kernel, its packing, its tails (sizes that no vector divides) or its strides are wrong, or when the compiled
library stops building. Where there is no C compiler the kernels are not used at all and there is nothing to compare.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from octavo.kernels.activation import gelu_tanh_and_mul, gelu_tanh_and_mul_ref, silu_and_mul, silu_and_mul_ref
from octavo.kernels.linear import linear_ref
from octavo.kernels.native import PrefillPlan, native_kernels, native_status
from octavo.kernels.native.build import load_library
from octavo.kernels.norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from octavo.kernels.rope import interleave_order, rotate, rotate_ref
from octavo.quantization.int8 import linear_int8_ref, quantize_weight

needs_native = pytest.mark.skipif(native_kernels() is None, reason=native_status())


TOKENS = [1, 2, 3, 5, 13, 70, 300]
SIZES = [(576, 96), (48, 37), (30, 9), (1000, 4), (17, 1)]


@needs_native
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("size", "outputs"), SIZES)
def test_linear_float32(tokens, size, outputs):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2 * size, generator=generator)[:, :size]  # rows lie apart
    weight, bias = torch.randn(outputs, size, generator=generator), torch.randn(outputs, generator=generator)
    native = native_kernels()
    for b in (None, bias):
        got = native.linear_float32(x, native.pack_float32(weight), outputs, b)
        expected = linear_ref(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6 * size)


@needs_native
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("size", "outputs"), SIZES)
def test_linear_int8(tokens, size, outputs):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2 * size, generator=generator)[:, :size]  # rows lie apart
    x[0] *= 1e3
    original = torch.randn(outputs, size, generator=generator)
    weight, scale = quantize_weight(original, 127)
    bias = torch.randn(outputs, generator=generator)
    native = native_kernels()
    packed = native.quantize_int8(original)
    for b in (None, bias):
        expected = linear_int8_ref(x, weight, scale, b)
        size_of_sums = x.norm(dim=1)[:, None] * (weight * scale[:, None]).norm(dim=1)
        error = (native.linear_int8(x, *packed, outputs, b) - expected).abs() / (size_of_sums + 1e-3 * expected.abs())
        assert error.max() < 1e-4


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantize_int8(dtype):
    """More rows than are rounded at once, the last panel and the last pair not full."""
    original = torch.randn(1100, 33).to(dtype) * torch.logspace(-6, 3, 1100)[:, None]
    original[5] = 0
    expected, expected_scale = quantize_weight(original, 127)
    panels, scale = native_kernels().quantize_int8(original)
    torch.testing.assert_close(scale[:1100], expected_scale)
    assert not scale[1100:].any()
    unpacked = panels.transpose(1, 2).flatten(0, 1).flatten(1)
    assert not unpacked[1100:].any()
    assert not unpacked[:, 33:].any()
    difference = (unpacked[:1100, :33].int() - expected.int()).abs()
    assert difference.max() <= 1  # a tie may fall to either side
    assert (difference > 0).float().mean() < 1e-3


@needs_native
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_product_of_a_row_does_not_depend_on_the_batch(kind):
    generator = torch.Generator().manual_seed(0)
    native = native_kernels()
    x, weight = torch.randn(43, 96, generator=generator), torch.randn(50, 96, generator=generator)
    if kind == "int8":
        packed = native.quantize_int8(weight)
        together = native.linear_int8(x, *packed, 50, None)
        alone = torch.cat([native.linear_int8(row, *packed, 50, None) for row in x.split(1)])
    else:
        panels = native.pack_float32(weight)
        together = native.linear_float32(x, panels, 50, None)
        alone = torch.cat([native.linear_float32(row, panels, 50, None) for row in x.split(1)])
    assert torch.equal(together, alone)


@needs_native
def test_linear_int8_never_overflows():
    """The largest sums that inputs and weights can give, at a width where 16-bit inputs would not fit."""
    native = native_kernels()
    packed = native.quantize_int8(torch.ones(4, 20000))
    got = native.linear_int8(torch.ones(1, 20000), *packed, 4, None)
    torch.testing.assert_close(got, torch.full((1, 4), 20000.0), rtol=1e-3, atol=0)


def attend_ref(q, cache, table, runs, window, sinks):
    """Attention of each run by plain operators in float64."""
    out = torch.zeros_like(q)
    heads_per_group = q.shape[1] // cache.shape[3]
    for row, count, position, request in runs:
        end = position + count
        pair = cache[table[request].long()].flatten(0, 1)[:end].double()
        keys, values = pair.repeat_interleave(heads_per_group, 2).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), keys) * 0.2
        at, of = torch.arange(position, end)[:, None], torch.arange(end)
        scores.masked_fill_((of > at) | (of <= at - (window or end)), float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), 2)
        weights = scores.softmax(2)[..., :end]
        out[row : row + count] = torch.einsum("hqk,khd->qhd", weights, values).float()
    return out


@needs_native
@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 16), (4, 4, 48)])
def test_prefill_attention(window, has_sinks, heads, groups, size):
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(60, 8, 2, groups, size, generator=generator)
    table = torch.randperm(59, generator=generator)[:54].int().view(2, 27) + 1
    q = torch.randn(260, heads + 1, size, generator=generator)[:, :heads] * 3
    sinks = torch.randn(heads, generator=generator) * 3 if has_sinks else None
    runs = [(0, 2, 0, 0), (2, 150, 37, 0), (152, 100, 116, 1)]
    out = torch.full(q.shape, 7.0)
    native_kernels().prefill_attention(q, cache, PrefillPlan(table, runs), 0.2, out, window=window, sinks=sinks)
    torch.testing.assert_close(out[:252], attend_ref(q, cache, table, runs, window, sinks)[:252])
    assert (out[252:] == 7).all(), "only planned rows are written"


@needs_native
@pytest.mark.parametrize("window", [None, 70])
def test_prefill_attention_does_not_depend_on_chunks(window):
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(60, 8, 2, 2, 32, generator=generator)
    table, q = torch.arange(1, 51).int()[None], torch.randn(300, 4, 32, generator=generator)

    def attend(bounds):
        out = torch.empty_like(q)
        runs = [(first, last - first, 20 + first, 0) for first, last in itertools.pairwise(bounds)]
        for run in runs:
            native_kernels().prefill_attention(q, cache, PrefillPlan(table, [run]), 0.2, out, window=window)
        return out

    assert torch.equal(attend([0, 300]), attend([*range(0, 300, 7), 300]))


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

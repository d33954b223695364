"""Which attention library serves a model, and how each is called: with fakes, since none can run here.

Red when a library is chosen that lacks what the model needs, when a reason is missing, or when window, scale, softcap
or head groups do not reach the library as its signature wants them.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from octavo.attention import flashinfer, libraries
from octavo.attention.backend import AttentionSpec
from octavo.attention.flashinfer import FlashInferBackend
from octavo.attention.libraries import FLASH_LIBRARIES, XFORMERS, Lengths, find_flash, load_flash, load_xformers
from octavo.attention.xformers import XformersBackend
from octavo.errors import ConfigError
from tests.unit.attention.test_torch_sdpa import check_backend, dense

SPEC = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, scale=0.2
)
FLOAT = replace(SPEC, dtype=torch.float32, kv_dtype=torch.float32)


@pytest.fixture
def installed(monkeypatch):
    """Names of modules that appear to be installed, on a GPU of capability 9.0."""
    names: set[str] = set()
    monkeypatch.setattr(libraries, "is_installed", lambda name: name in names)
    monkeypatch.setattr(libraries, "device_capability", lambda: (9, 0))
    monkeypatch.setattr(libraries, "load_flash", lambda library, spec: None)
    return names


def test_the_fastest_library_that_fits_is_chosen(installed):
    installed |= {"fa3_fwd._C", "flash_attn.flash_attn_interface", "torch.nn.attention.varlen"}
    assert find_flash(SPEC)[0].module == "fa3_fwd._C"
    for changes, because in [
        ({"sliding_window": 9}, "no sliding window"),
        ({"dtype": torch.float16}, "no torch.float16"),
        ({"head_dim": 80}, "no head size 80"),
    ]:
        library, reasons = find_flash(replace(SPEC, **changes))
        assert library.name == "FlashAttention 2"
        assert because in reasons
        assert "flash_attn_interface is not installed" in reasons


def test_a_library_that_does_not_fit_this_torch_is_passed_over(installed, monkeypatch):
    installed |= {"fa3_fwd._C", "torch.nn.attention.varlen"}

    def load(library, spec):
        raise OSError("/x/fa3.so: undefined\n symbol: _ZN3c105")

    monkeypatch.setattr(libraries, "load_flash", load)
    library, reasons = find_flash(SPEC)
    assert library.name == "torch's varlen_attn"
    assert "fa3-fwd): it is installed, but cannot be loaded (/x/fa3.so: undefined symbol: _ZN3c105)" in reasons


def test_one_that_was_asked_for_and_is_broken_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ConfigError, match=r"xFormers is installed, but cannot be loaded \(import of xformers\.ops"):
        XformersBackend(SPEC)


def test_nothing_fits_and_every_reason_is_told(installed):
    installed |= {"fa3_fwd._C", "torch.nn.attention.varlen"}
    library, reasons = find_flash(replace(SPEC, sliding_window=9, logit_softcap=1.0))
    assert library is None
    assert all(each.name in reasons for each in FLASH_LIBRARIES)
    assert "no logit softcap" in reasons
    assert "no torch.float32" in find_flash(FLOAT)[1]


def test_other_gpus_get_what_is_made_for_them(installed, monkeypatch):
    installed |= {"fa3_fwd._C", "flash_attn.flash_attn_interface"}
    monkeypatch.setattr(libraries, "device_capability", lambda: (8, 9))
    library, reasons = find_flash(SPEC)
    assert library.name == "FlashAttention 2"
    assert "compute capability 8.9" in reasons


def reference(q, k, v, query_lens, key_lens, spec):
    """Each request by itself."""
    parts = []
    for q_, k_, v_ in zip(q.split(query_lens), k.split(key_lens), v.split(key_lens), strict=True):
        parts.append(dense(q_.float(), k_.float(), v_.float(), spec))
    return torch.cat(parts)


def request(spec):
    generator = torch.Generator().manual_seed(0)
    query_lens, key_lens = (3, 5), (3, 11)
    q = torch.randn(8, spec.num_heads, spec.head_dim, generator=generator)
    k, v = (torch.randn(14, spec.num_kv_heads, spec.head_dim, generator=generator) for _ in range(2))
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, key_lens)]
    return q, k, v, Lengths(*starts, query_lens, key_lens)


def from_starts(q, k, v, starts_q, starts_k, spec):
    return reference(q, k, v, starts_q.diff().tolist(), starts_k.diff().tolist(), spec)


def test_a_flash_attention_gets_window_softcap_and_scale(monkeypatch):
    spec = replace(FLOAT, sliding_window=4, logit_softcap=2.0)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                               causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        assert causal
        assert (max_seqlen_q, max_seqlen_k) == (5, 11)
        seen = replace(FLOAT, scale=softmax_scale, sliding_window=window_size[0] + 1, logit_softcap=softcap)
        return from_starts(q, k, v, cu_seqlens_q, cu_seqlens_k, seen), None

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q, k, v, lengths = request(spec)
    result = load_flash(FLASH_LIBRARIES[0], spec)(q, k, v, lengths)
    torch.testing.assert_close(result, reference(q, k, v, *lengths_of(lengths), spec))


def lengths_of(lengths):
    return lengths.query_lens, lengths.key_lens


def test_a_registered_operator_is_called_by_its_schema(monkeypatch):
    definitions = torch.library.Library("octavo_test_flash", "DEF")
    definitions.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, "
        "float softcap=0.0, int num_splits=0) -> (Tensor, Tensor)"
    )

    def fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, softcap, splits):
        assert is_causal
        assert splits == 1
        assert (max_seqlen_q, max_seqlen_k) == (5, 11)
        seen = replace(FLOAT, scale=softmax_scale, logit_softcap=softcap)
        return from_starts(q, k, v, cu_seqlens_q, cu_seqlens_k, seen), q.new_empty(0)

    definitions.impl("fwd", fwd, "CPU")
    monkeypatch.setitem(sys.modules, "octavo_test_flash", types.SimpleNamespace())
    spec = replace(FLOAT, logit_softcap=2.0)
    library = replace(FLASH_LIBRARIES[1], module="octavo_test_flash", function="octavo_test_flash.fwd")
    q, k, v, lengths = request(spec)
    torch.testing.assert_close(
        load_flash(library, spec)(q, k, v, lengths), reference(q, k, v, *lengths_of(lengths), spec)
    )
    with pytest.raises(ImportError, match="registers no operator octavo_test_flash.other"):
        load_flash(replace(library, function="octavo_test_flash.other"), spec)


def test_an_older_varlen_attn_of_torch_has_neither_scale_nor_groups(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, -1)):
        assert key.shape[1] == query.shape[1]
        assert (max_q, max_k, window_size) == (5, 11, (-1, 0))
        seen = replace(FLOAT, scale=FLOAT.head_dim**-0.5, num_kv_heads=FLOAT.num_heads)
        return from_starts(query, key, value, cu_seq_q, cu_seq_k, seen)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    q, k, v, lengths = request(FLOAT)
    result = load_flash(FLASH_LIBRARIES[-1], FLOAT)(q, k, v, lengths)
    torch.testing.assert_close(result, reference(q, k, v, *lengths_of(lengths), FLOAT))


def test_a_library_that_cannot_be_told_the_window_is_an_error(monkeypatch):
    module = types.SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, causal=False: q)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    with pytest.raises(ImportError, match="does not know window_size"):
        load_flash(FLASH_LIBRARIES[0], replace(SPEC, sliding_window=4))


def test_xformers_gets_groups_as_a_dimension(monkeypatch):
    class Bias:
        window = None

        @classmethod
        def from_seqlens(cls, query_lens, key_lens):
            bias = cls()
            bias.lens = query_lens, key_lens
            return bias

        def make_local_attention(self, window):
            self.window = window
            return self

    def forward(q, k, v, attn_bias, scale):
        assert q.shape[:1] + q.shape[2:] == (1, 2, 2, 64)
        seen = replace(FLOAT, scale=scale, sliding_window=attn_bias.window)
        return reference(q[0].flatten(1, 2), k[0, :, :, 0], v[0, :, :, 0], *attn_bias.lens, seen)[None].view(q.shape)

    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(memory_efficient_attention_forward=forward))
    biases = types.SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Bias)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", biases)
    for spec in (FLOAT, replace(FLOAT, sliding_window=4)):
        q, k, v, lengths = request(spec)
        result = load_xformers(spec)(q, k, v, lengths)
        torch.testing.assert_close(result, reference(q, k, v, *lengths_of(lengths), spec))


def test_xformers_says_why_not(installed):
    assert XFORMERS.unsupported(SPEC) == "xformers.ops is not installed"
    installed.add("xformers.ops")
    assert XFORMERS.unsupported(SPEC) is None
    assert "softcap" in XFORMERS.unsupported(replace(SPEC, logit_softcap=1.0))


def test_flashinfer_says_why_not(monkeypatch):
    names: set[str] = set()
    monkeypatch.setattr(flashinfer, "is_installed", lambda name: name in names)
    monkeypatch.setattr(flashinfer, "_has_compiler", lambda: False)
    monkeypatch.setattr(flashinfer, "device_capability", lambda: (9, 0))
    assert "NVIDIA" in FlashInferBackend.unsupported(SPEC, "cpu")
    assert "not installed" in FlashInferBackend.unsupported(SPEC, "cuda")
    names.add("flashinfer")
    assert "nvcc" in FlashInferBackend.unsupported(SPEC, "cuda")
    names.add("flashinfer_jit_cache")
    assert FlashInferBackend.unsupported(SPEC, "cuda") is None
    assert "head size 80" in FlashInferBackend.unsupported(replace(SPEC, head_dim=80), "cuda")


class FakeWrapper:
    """FlashInfer's wrappers, computing in plain torch what they were planned for."""

    def __init__(self, workspace, kv_layout, **_):
        assert kv_layout == "HND"

    def plan(self, *plan, sm_scale, logits_soft_cap, window_left, causal=None, **_):
        if causal is None:  # the decode wrapper has no query offsets
            plan = (torch.arange(len(plan[0])), *plan)
        self.queries, self.indptr, self.indices, self.last, *sizes = plan
        heads, kv_heads, head_dim, self.page = sizes
        window = None if window_left < 0 else window_left + 1
        self.spec = replace(FLOAT, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=sm_scale,
                            sliding_window=window, logit_softcap=logits_soft_cap)  # fmt: skip

    def run(self, q, cache):
        parts = []
        for index, queries in enumerate(q.split(self.queries.diff().tolist())):
            blocks = self.indices[self.indptr[index] : self.indptr[index + 1]].long()
            length = (len(blocks) - 1) * self.page + int(self.last[index])
            k, v = cache[blocks].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
            parts.append(dense(queries, k, v, self.spec))
        return torch.cat(parts)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 2.0)])
def test_flashinfer_is_planned_with_pages_and_lengths(monkeypatch, window, softcap):
    fake = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FakeWrapper, BatchPrefillWithPagedKVCacheWrapper=FakeWrapper
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    spec = replace(FLOAT, sliding_window=window, logit_softcap=softcap)
    work = [(0, 20), (33, 1), (16, 7), (0, 1), (31, 1)]
    check_backend(FlashInferBackend(spec), spec, work, scattered=True, padding=2, seed=1)

"""Prompts through a library, decode through our kernel: pages gathered rightly, runs cut rightly. In the interpreter
and on a GPU. Red when a page lands in the wrong place, or a request in the wrong call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.device import DEVICE

# isort: split
from octavo.attention import library_prefill
from octavo.attention.library_prefill import LibraryPrefillBackend
from octavo.kernels.attention.gather import gather_pages, gather_pages_ref
from tests.unit.attention.test_torch_sdpa import SPEC, check_backend, dense

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]


class PlainLibrary(LibraryPrefillBackend):
    """A library that is the reference, and remembers its calls."""

    def _load(self, spec):
        self.calls = []

        def attend(q, k, v, lengths):
            self.calls.append((lengths.query_lens, lengths.key_lens))
            assert lengths.query_starts.tolist()[-1] == len(q)
            assert lengths.key_starts.tolist()[-1] == len(k)
            parts = zip(q.split(lengths.query_lens), k.split(lengths.key_lens), v.split(lengths.key_lens), strict=True)
            return torch.cat([dense(*(each.float().cpu() for each in part), spec) for part in parts]).to(q)

        return attend


@pytest.mark.parametrize("window", [None, 9])
def test_mixed_steps(window):
    spec = replace(SPEC, sliding_window=window)
    backend = PlainLibrary(spec)
    work = [(0, 20), (0, 3), (33, 1), (16, 7), (40, 5), (0, 9), (3, 1)]
    check_backend(backend, spec, work, scattered=True, padding=2, device=DEVICE)
    # Fresh prompts together, those with a history together, never across a decode.
    assert backend.calls == [((20, 3), (20, 3)), ((7, 5), (23, 45)), ((9,), (9,))]


def test_gathered_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(library_prefill, "_MAX_GATHERED", 64)
    backend = PlainLibrary(SPEC)
    check_backend(backend, SPEC, [(16, 7), (20, 9), (30, 5), (100, 5)], scattered=True, device=DEVICE)
    assert [key_lens for _, key_lens in backend.calls] == [(23, 29), (35,), (105,)]


@pytest.mark.parametrize(("page", "size"), [(16, 64), (48, 80), (64, 128)])
def test_gather(page, size):
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(7, 2, 2, page, size, generator=generator).to(DEVICE)
    table = torch.tensor([[3, 1, 0], [6, 2, 4]], dtype=torch.int32, device=DEVICE)
    pages = torch.tensor([[1, 0, 0, page], [1, 1, page, 5], [0, 1, page + 5, page]], dtype=torch.int32, device=DEVICE)
    result = gather_pages(cache, table, pages, 2 * page + 5, torch.float16)
    torch.testing.assert_close(result, gather_pages_ref(cache, table, pages, 2 * page + 5, torch.float16))

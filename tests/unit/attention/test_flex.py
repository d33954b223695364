"""FlexAttention over pages against the dense reference, on the CPU. Red when a page, window, group or cap is missed, or
when a subclass's score sees anything but positions in its own request."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from octavo.attention.flex import FlexBackend
from octavo.attention.registry import choose_backend
from octavo.batch import StepShape
from tests.unit.attention.test_torch_sdpa import SPEC, check_backend


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (40, 2.0)])
def test_random_mixed_batches(window, softcap):
    rng = random.Random(3)
    spec = replace(SPEC, sliding_window=window, logit_softcap=softcap)
    work = [(rng.choice([0, 1, 15, 16, 17, 63, 150]), rng.choice([1, 1, 2, 16, 33])) for _ in range(5)]
    check_backend(FlexBackend(spec), spec, work, scattered=True, padding=3)


@pytest.mark.parametrize("changes", [
    {"head_dim": 80, "num_heads": 4, "num_kv_heads": 4},
    {"head_dim": 256, "num_heads": 3, "num_kv_heads": 1, "block_size": 64},
    {"kv_dtype": torch.bfloat16},
])  # fmt: skip
def test_shapes(changes):
    spec = replace(SPEC, **changes)
    check_backend(FlexBackend(spec), spec, [(20, 1), (0, 19), (130, 140)], scattered=True, seed=1)


def test_padding_is_as_on_a_gpu():
    """The path of a GPU, where the whole cache is the keys and queries are padded to blocks of the mask."""

    class Uncopied(FlexBackend):
        def _make_calls(self, meta, num_blocks, *, is_copied):
            super()._make_calls(meta, num_blocks, is_copied=False)

    for window in (None, 33):
        spec = replace(SPEC, sliding_window=window, block_size=64)
        # Zeros, as the engine's cache: pages are not copied, so what was never written is multiplied by zero.
        check_backend(Uncopied(spec), spec, [(150, 1), (70, 135), (0, 1)], scattered=True, padding=2, fill=0.0)


def test_the_mask_names_only_pages_that_are_seen():
    """On a GPU nothing else is read; red when the window or the diagonal lets pages through that hold nothing seen."""
    spec = replace(SPEC, sliding_window=20)
    backend = FlexBackend(spec)
    table = torch.arange(100, 120, dtype=torch.int32)[None]
    step = StepShape(130, 1, 130, 300, (130,), (300,))
    meta = backend.plan(step, torch.tensor([0, 130]), torch.tensor([300]), table, torch.arange(130))
    backend._make_calls(meta, 200, is_copied=False)
    (call,) = meta.calls
    # Queries 170..297 see keys 151..297, pages 9..18; queries 298 and 299 see keys 279..299, pages 17 and 18.
    assert call.mask.kv_num_blocks.tolist() == [[[10, 2]]]
    assert call.mask.kv_indices[0, 0, 0, :10].tolist() == list(range(109, 119))
    assert call.mask.kv_indices[0, 0, 1, :2].tolist() == [117, 118]


def test_a_name_and_aliases():
    for name in ("flex", "FLEX_ATTENTION"):
        assert choose_backend(name, SPEC, "cpu")[0] is FlexBackend
    assert "one type" in FlexBackend.unsupported(replace(SPEC, kv_dtype=torch.float16), "cuda")

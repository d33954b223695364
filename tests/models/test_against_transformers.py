"""Logits equal transformers', in prefill, chunked prefill and decode, without engine or worker around the model.

``test_families.py`` has all families; here are those that differ in what happens between projection and attention. Red
when: a rotation, norm, bias, head order, shard order, mask or cache slot is wrong in any of the paths.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.harness import PagedModel
from tests.models.hf import load_state, make_reference, model_config

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 77, (90,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module", params=["biases", "llama3-rope", "one-kv-head", "qwen3"])
def pair(request):
    reference = make_reference(request.param)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    config = model_config(reference.config)
    state = reference.state_dict()

    def build(**options) -> PagedModel:
        paged = PagedModel(config, **options)
        load_state(paged.model, state)
        return paged

    return build, expected


@pytest.mark.parametrize("chunk", [1, 7, 64, 90])
def test_chunked_prefill(pair, chunk):
    build, expected = pair
    assert (build().feed(0, TOKENS, chunk) - expected).abs().max() <= TOLERANCE


def test_decode_and_prefill_mixed_over_scattered_blocks(pair):
    """Three requests at different places: one decodes, one continues a prompt, one starts."""
    build, expected = pair
    paged = build(scattered=True)
    paged.step({0: TOKENS[:50]})
    got = paged.step({1: TOKENS[:33], 0: TOKENS[50:51]})
    assert (got[0] - expected[50:51]).abs().max() <= TOLERANCE
    got = paged.step({0: TOKENS[51:52], 1: TOKENS[33:70], 2: TOKENS})
    assert (got[0] - expected[51:52]).abs().max() <= TOLERANCE
    assert (got[1] - expected[33:70]).abs().max() <= TOLERANCE
    assert (got[2] - expected).abs().max() <= TOLERANCE

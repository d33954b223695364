"""A lone token through the fused form of a block: the same logits as through its parts.

On the CPU the kernels are replaced by their references. Red when a norm, a gate, a bias or a sum with the residual
stream is left out or done twice in that form.
"""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.linear import row_linear_ref
from octavo.layers import linear
from tests.models.harness import PagedModel
from tests.models.hf import load_state, make_reference, model_config

TOKENS = torch.randint(0, 77, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("case", ["biases", "tied", "qwen3", "qwen3-bias"])
def test_equals_the_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_reference(case)
    paged = [PagedModel(model_config(reference.config)) for _ in range(2)]
    for each in paged:
        load_state(each.model, reference.state_dict())
    expected = paged[0].feed(0, TOKENS, 1)
    calls: list[int] = []

    def counted(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return row_linear_ref(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "has_row_kernel", lambda x, weight: len(x) == 1 and x.shape[1] % len(weight.t()) == 0)
    monkeypatch.setattr(linear, "row_linear", counted)
    got = paged[1].feed(0, TOKENS, 1)
    assert len(calls) == 4 * reference.config.num_hidden_layers * len(TOKENS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

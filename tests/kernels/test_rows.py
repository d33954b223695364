"""Gathering a decode step's inputs from the rows and committing its tokens, against plain torch.

Runs on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``); skipped where there is neither.
Red when a row, column or length is mixed up, or when the dummy row gets a slot or is written.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE

# isort: split
from octavo.kernels.rows import decode_step

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
ROWS, WIDTH = 12, 4000


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize(("page", "count"), [(16, 1), (16, 7), (64, 12), (256, 200)])
def test_a_step_against_plain_torch(page: int, count: int, num_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(count)
    token_ids = torch.randint(0, 1000, (ROWS + 1, WIDTH + 1), generator=generator, dtype=torch.int32)
    num_computed = torch.randint(0, WIDTH, (ROWS + 1,), generator=generator)
    num_computed[:3] = torch.tensor([0, page, page - 1])
    num_computed[ROWS] = 0
    tables = [
        torch.randint(1, 10**6, (ROWS + 1, -(-WIDTH // page) + 1), generator=generator, dtype=torch.int32)
        for _ in range(num_groups)
    ]
    index = torch.full((count,), ROWS)
    real = min(count, ROWS) - (count > 1)
    index[:real] = torch.randperm(ROWS, generator=generator)[:real]
    drawn = torch.randint(-1, 1000, (count,), generator=generator)

    def run(device: str) -> list[torch.Tensor]:
        state = [t.to(device).clone() for t in (index, num_computed, token_ids)]
        inputs = decode_step.gather_decode(*state, [t.to(device) for t in tables], ROWS, page)
        shown = torch.zeros(count, dtype=torch.int64, device=device)
        decode_step.commit_decode(*state, drawn.to(device), shown, ROWS)
        after_tokens = [t.clone() for t in state]
        decode_step.commit_decode(*state, None, shown, ROWS)
        found = [inputs.input_ids, inputs.positions, inputs.lengths, inputs.seq_lens, *inputs.slots, shown]
        for table in inputs.block_tables:
            for i, length in enumerate(inputs.seq_lens.tolist()):
                found.append(table[i, : -(-length // page)])
        return [t.cpu() for t in [*found, *after_tokens[1:], *state[1:]]]

    got = run(DEVICE)
    monkeypatch.setattr(decode_step, "_triton", lambda tensor: None)
    for one, other in zip(got, run("cpu"), strict=True):
        assert torch.equal(one, other)

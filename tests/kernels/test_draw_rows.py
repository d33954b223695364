"""The sampling kernels against plain torch, row by row.

Runs on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``); skipped where there is neither.
Red when a kernel keeps another set of tokens than its filters say, draws another token than the uniform number means,
mixes up rows, or draws where nothing can be drawn.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.kernels.gpu.sampling import draw_rows
from octavo.kernels.sampling.draw import mix_seed
from octavo.kernels.sampling.filters import FilterColumns, kept_threshold_ref
from octavo.kernels.sampling.rows import RowColumns, draw_rows_ref

# Triton 3.6's interpreter on NumPy 2, whose integers warn when they wrap.
pytestmark = [
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
NUM_ROWS = 7


def make_columns(**changes: object) -> RowColumns:
    """Rows whose entries are the given numbers, or one number for all."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        value = changes.get(name, default)
        values = value if isinstance(value, list) else [value] * NUM_ROWS
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return RowColumns(
        temperature=column("temperature", 1.0, torch.float32),
        stream=torch.tensor([mix_seed(seed) for seed in range(NUM_ROWS)], device=DEVICE),
        num_prompt=column("num_prompt", 3, torch.int64),
        log_min_p=column("log_min_p", float("-inf"), torch.float32),
        top_k=column("top_k", 0, torch.int64),
        top_p=column("top_p", 1.0, torch.float64),
    )


def run(
    logits: torch.Tensor, columns: RowColumns, rows: list[int], lengths: list[int], *, has_filters: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, the reference's tokens, thresholds."""
    row_index, length = torch.tensor(rows, device=DEVICE), torch.tensor(lengths, device=DEVICE)
    tokens, thresholds = draw_rows(
        logits, columns.temperature, columns.stream, columns.num_prompt, columns.log_min_p, columns.top_k,
        columns.top_p, row_index, length, has_filters,
    )  # fmt: skip
    return tokens, draw_rows_ref(logits, columns, row_index, length, has_filters=has_filters), thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [17, 1000, 5000])
def test_unfiltered(vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab_size)
    columns = make_columns(temperature=[0.0, 0.6, 1.0, 2.0, 0.01, 0.0, 1.5], num_prompt=[0, 1, 2, 3, 4, 5, 6])
    # A slice of a wider tensor, rows out of order and twice.
    logits = (torch.randn(9, vocab_size + 8, device=DEVICE) * 3).to(dtype)[:, :vocab_size]
    logits[:, 5] = float("-inf")
    rows = [3, 0, 6, 1, 1, 2, 4, 5, 0]
    for step in range(2 if IS_INTERPRETED else 20):
        tokens, expected, _ = run(logits, columns, rows, [10 + step + i for i in range(9)], has_filters=False)
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [0.05, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("vocab_size", [300, 5000] if IS_INTERPRETED else [300, 5000, 151_936])
def test_filters(vocab_size: int, scale: float) -> None:
    torch.manual_seed(1)
    columns = make_columns(
        temperature=[1.0, 0.7, 1.0, 1.0, 0.0, 1.0, 1.3],
        top_k=[5, 0, 0, 50, 3, 0, 200],
        top_p=[1.0, 0.9, 1.0, 0.5, 0.1, 1.0, 0.95],
        log_min_p=[float("-inf"), float("-inf"), -2.0, -3.0, -1.0, float("-inf"), float("-inf")],
    )
    # In 1/64: many logits are equal, as in bfloat16.
    logits = (torch.randn(NUM_ROWS, vocab_size, device=DEVICE) * scale * 64).round() / 64
    rows = list(range(NUM_ROWS))
    tokens, expected, thresholds = run(logits, columns, rows, [9] * NUM_ROWS, has_filters=True)
    scaled = logits / columns.temperature.where(columns.temperature > 0, 1.0).unsqueeze(1)
    filters = FilterColumns(columns.log_min_p, columns.top_k, 200, columns.top_p)
    kept = scaled >= kept_threshold_ref(scaled, filters).unsqueeze(1)
    assert thresholds is not None
    assert thresholds[4] == thresholds[5] == float("-inf"), "a greedy row and one without filters have no threshold"
    for row in (0, 1, 2, 3, 6):
        # A GPU divides by the temperature with an error of its own; the logits lie 1/64 apart.
        assert torch.equal(scaled[row] >= thresholds[row] - 1e-4, kept[row]), row
    assert tokens.tolist() == expected.tolist()


@pytest.mark.skipif(IS_INTERPRETED, reason="draws by the thousand; the interpreter is compared token by token above")
def test_follows_the_distribution() -> None:
    # Pearson's statistic of the drawn tokens against the weights that top-k leaves: below the 99.9 % quantile.
    torch.manual_seed(0)
    count, vocab_size = 20_000, 40
    logits = torch.randn(1, vocab_size, device=DEVICE).expand(count, -1).contiguous()
    for top_k in (0, 10):
        columns = make_columns(top_k=top_k, num_prompt=0)
        row_index = torch.zeros(count, dtype=torch.int64, device=DEVICE)
        tokens, _ = draw_rows(
            logits, columns.temperature, columns.stream, columns.num_prompt, columns.log_min_p, columns.top_k,
            columns.top_p, row_index, torch.arange(count, device=DEVICE), top_k > 0,
        )  # fmt: skip
        best = logits[0].topk(top_k or vocab_size).indices
        weights = torch.zeros(vocab_size, device=DEVICE)
        weights[best] = logits[0, best].softmax(0)
        seen = torch.bincount(tokens, minlength=vocab_size)
        assert seen[weights == 0].sum() == 0
        expected = weights[weights > 0] * count
        statistic = float(((seen[weights > 0] - expected) ** 2 / expected).sum())
        assert statistic < {0: 72.1, 10: 27.9}[top_k]


@pytest.mark.parametrize("has_filters", [False, True])
def test_no_token(has_filters: bool) -> None:
    columns = make_columns(temperature=[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], top_k=5 if has_filters else 0)
    logits = torch.zeros(NUM_ROWS, 600, device=DEVICE)
    logits[0] = logits[1] = float("-inf")
    logits[2, 70] = logits[3, 70] = float("nan")
    logits[4] = float("-inf")
    logits[4, 599] = -1e30
    tokens, expected, _ = run(logits, columns, list(range(NUM_ROWS)), [4] * NUM_ROWS, has_filters=has_filters)
    assert tokens.tolist()[:5] == [-1, -1, -1, -1, 599]
    assert tokens[5] == 0
    assert tokens[4:].tolist() == expected[4:].tolist()

"""Temperature, min-p, top-k, top-p and the draw in one call, from columns that stay where they are between steps.

What a step without masks and penalties needs. Rows are named by an index on the device and nothing is read back, so a
captured CUDA graph of it serves whatever rows a step has. On a GPU the logits are read once where no row has a filter.
Knows no request; ``sampling/row_parameters.py`` fills the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.gpu import gpu_kernels
from octavo.kernels.sampling.candidates import most_likely_ref
from octavo.kernels.sampling.draw import draw_ref, uniform_ref
from octavo.kernels.sampling.filters import FilterColumns, kept_threshold_ref


@dataclass(frozen=True, slots=True)
class RowColumns:
    """One entry for each row of the engine, all on the device."""

    temperature: Tensor
    """float32, 0 = take the most likely token."""
    stream: Tensor
    """int64, see ``draw.py``."""
    num_prompt: Tensor
    """int64."""
    log_min_p: Tensor
    """float32, -inf for none."""
    top_k: Tensor
    """int64 in [1, V], 0 for all."""
    top_p: Tensor
    """float64 in (0, 1], 1 for all."""


def has_row_kernels(device: torch.device) -> bool:
    """Whether ``draw_rows`` is faster than the steps of the reference one by one."""
    return device.type == "cuda"


def draw_rows_ref(
    logits_LV: Tensor, columns: RowColumns, row_index_L: Tensor, length_L: Tensor, *, has_filters: bool
) -> Tensor:
    """One token for each position.

    Args:
        logits_LV: ``[L, V]``, any float dtype; read only.
        columns: Of all rows.
        row_index_L: ``[L]`` int64.
        length_L: ``[L]`` int64 known tokens, so the position of the token to draw.
        has_filters: Whether any row may have min-p, top-k or top-p.

    Returns:
        ``[L]`` int64; -1 where no token can be drawn: the best logit is NaN or -inf.
    """
    temperature = columns.temperature[row_index_L].unsqueeze(1)
    logits = logits_LV.float()
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    if has_filters:
        top_k = columns.top_k[row_index_L]
        filters = FilterColumns(columns.log_min_p[row_index_L], top_k, int(top_k.max()), columns.top_p[row_index_L])
        threshold = kept_threshold_ref(scaled, filters).unsqueeze(1)
        scaled = torch.where(scaled < threshold, -torch.inf, scaled)
    uniform = uniform_ref(columns.stream[row_index_L], length_L - columns.num_prompt[row_index_L])
    drawn = draw_ref(scaled.softmax(dim=1), uniform)
    return torch.where(temperature.squeeze(1) > 0, drawn, most_likely_ref(logits))


def draw_rows(
    logits_LV: Tensor, columns: RowColumns, row_index_L: Tensor, length_L: Tensor, *, has_filters: bool
) -> Tensor:
    """As ``draw_rows_ref``, in two launches on a GPU, three with filters; safe to capture there."""
    if not logits_LV.is_cuda:
        return draw_rows_ref(logits_LV, columns, row_index_L, length_L, has_filters=has_filters)
    tokens, _ = gpu_kernels("sampling").draw_rows(
        logits_LV, columns.temperature, columns.stream, columns.num_prompt, columns.log_min_p, columns.top_k,
        columns.top_p, row_index_L, length_L, has_filters,
    )  # fmt: skip
    return tokens

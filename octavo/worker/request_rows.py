"""Persistent state of every request on the device: its tokens and how many of them are computed.

A request keeps one row while it runs. A step writes the tokens that it draws back to the row, so the next step can be
launched before the host has seen them. Knows no blocks (``block_tables.py``) and no sampling parameters (the sampler).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.device import Device
from octavo.messages import NewRow


class RequestRows:
    """Token histories and lengths; one writer, the model runner.

    Attributes:
        token_ids: ``[rows, max_model_len + 1]`` int32 on the device. The last column takes the token that may be drawn
            when a text is already full.
        num_computed: ``[rows]`` int64 on the device: tokens whose keys and values are in the cache.
        num_tokens_host: Known tokens, on the host, counting tokens that a step in flight will draw.
        num_computed_host: ``num_computed`` on the host, counting steps in flight.
        num_prompt_host: Prompt tokens.
        dummy_row: One row more than there are requests: what fills a batch up points here. Nothing is written to it.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: Device) -> None:
        self._device = device
        self.width = max_model_len + 1
        self.dummy_row = max_num_seqs
        self.token_ids = device.zeros((max_num_seqs + 1, self.width), torch.int32)
        self.num_computed = device.zeros((max_num_seqs + 1,), torch.int64)
        self.num_tokens_host = np.zeros(max_num_seqs, np.int64)
        self.num_computed_host = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_host = np.zeros(max_num_seqs, np.int64)

    def add(self, new_rows: list[NewRow]) -> None:
        """Requests take their rows."""
        for new in new_rows:
            tokens = torch.from_numpy(np.array(new.token_ids, np.int32))
            self._device.write(self.token_ids[new.row, : len(tokens)], tokens)
        rows = np.array([new.row for new in new_rows], np.int64)
        self.num_tokens_host[rows] = [len(new.token_ids) for new in new_rows]
        self.num_computed_host[rows] = [new.num_computed_tokens for new in new_rows]
        self.num_prompt_host[rows] = [new.num_prompt_tokens for new in new_rows]
        index, computed = self._device.upload_all((rows, self.num_computed_host[rows]))
        self.num_computed.index_copy_(0, index, computed)

    def advance(
        self, rows: NDArray[np.int64], row_index: Tensor, scheduled_host: NDArray[np.int64], scheduled: Tensor
    ) -> None:
        """Count this step's tokens as computed; ``rows`` are all different."""
        self.num_computed_host[rows] += scheduled_host
        self.num_computed.index_add_(0, row_index, scheduled)

    def skip(self, rows: Sequence[int], scheduled: Sequence[int]) -> None:
        """Count tokens as computed that were not: their requests have failed and are about to leave."""
        index, count = np.array(rows, np.int64), np.array(scheduled, np.int64)
        row_index, counts = self._device.upload_all((index, count))
        self.advance(index, row_index, count, counts)
        self.num_tokens_host[index] = np.maximum(self.num_tokens_host[index], self.num_computed_host[index] + 1)

    def append(self, history_base: Tensor, length: Tensor, tokens: Tensor) -> None:
        """Write the tokens just drawn behind their rows' texts.

        Args:
            history_base: ``[L]`` int64, row times ``width``.
            length: ``[L]`` int64 known tokens so far: where the token goes.
            tokens: ``[L]`` int64; -1 (nothing could be drawn) is written as 0, the request is about to end.
        """
        self.token_ids.view(-1).index_copy_(0, history_base + length, tokens.clamp(min=0).int())

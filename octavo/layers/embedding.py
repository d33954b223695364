"""Token embedding, and the output head when a model ties the two.

A tied table arrives once from the checkpoint and serves twice: rows are gathered from it, and the head multiplies by
it. What the head's product looks like is the QuantizationMethod's affair. Beside quantised weights a float32 table
would be the largest part of a small model, so it is kept in float16: 11 bits a value, against the 8 of the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer, Parameter
from octavo.quantization.method import LinearShape


class Embedding(Layer):
    """``[V, E]`` table; ``is_tied`` adds ``logits()`` over the same weights."""

    def __init__(self, context: LayerContext, vocab_size: int, hidden_size: int, *, is_tied: bool = False) -> None:
        self._context = context
        self._is_tied = is_tied
        narrow = context.quantization.name != "none" and context.dtype is torch.float32
        self._table_dtype = torch.float16 if narrow else context.dtype
        self._table = torch.empty(0, hidden_size, dtype=self._table_dtype, device=context.device)
        self._head: dict[str, Tensor] = {}
        self.shape = LinearShape(hidden_size, vocab_size, context.dtype)
        self.weight = Parameter((vocab_size, hidden_size), self._allocate, self._finish)

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[T] -> [T, E]``; a fresh tensor that the caller may change in place.

        On a GPU this kernel is not launched early: what the layers read before the kernels in front of them are done
        (``kernels/attention/decode_few.py``) was complete when it began.
        """
        return F.embedding(input_ids, self._table).to(self._context.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[L, E] -> [L, V]`` by the tied table."""
        return self._context.quantization.apply(self.shape, self._head, hidden, None)

    def _allocate(self) -> Tensor:
        return torch.empty(
            self.shape.out_features, self.shape.in_features, dtype=self._table_dtype, device=self._context.device
        )

    def _finish(self, table: Tensor) -> None:
        self._table = table
        if self._is_tied:
            method = self._context.quantization
            # Weights that stay as they are stay shared.
            self._head = (
                {"weight": table} if method.name == "none" else method.after_load(self.shape, {"weight": table})
            )

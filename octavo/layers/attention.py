"""Attention: the layer that owns a KV cache tensor and calls the backend.

Knows its AttentionSpec and its place among the attention layers; the worker binds cache, backend and KV group after
the cache has been sized. Where the tokens of a step lie in the cache is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.batch import ForwardBatch
from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer


class Attention(Layer):
    """Causal attention over the paged history of each request."""

    def __init__(
        self,
        context: LayerContext,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        """Announce a layer to ``context.attention_layers``; see ``LayerContext.attention_spec``."""
        self.spec = context.attention_spec(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
        )
        self.layer_index = len(context.attention_layers)
        self._backend: AttentionBackend | None = None
        self._cache: Tensor | None = None
        self._group_index = 0
        context.attention_layers.append(self)

    def bind(self, cache: Tensor, backend: AttentionBackend, group_index: int) -> None:
        """Give the layer its cache tensor (``backend.kv_shape()``), backend and index into ``batch.metadata``."""
        self._cache, self._backend, self._group_index = cache, backend, group_index

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """``q [T, H, D]``, ``k`` and ``v`` ``[T, G, D]`` to ``[T, H * D]``; writes this step's k and v to the cache."""
        assert self._backend is not None and self._cache is not None, "bind() comes before the first step"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._backend.forward(q, k, v, self._cache, batch.metadata[self._group_index], out)
        return out.flatten(1)

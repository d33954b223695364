"""Attention: the layer that owns a KV cache tensor and calls the backend.

Knows its AttentionSpec and its place among the attention layers; the worker binds cache, backend and KV group after
the cache has been sized. Where the tokens of a step lie in the cache is in the batch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend, HeadPreparation, ProjectionBackend
from octavo.batch import ForwardBatch
from octavo.kernels.rope import norm_rotate_write
from octavo.layers.context import LayerContext
from octavo.layers.norm import RMSNorm
from octavo.layers.parameter import Layer
from octavo.layers.rotary import Rotations, rotate_heads


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
        has_sinks: bool = False,
    ) -> None:
        """Announce a layer to ``context.attention_layers``; see ``LayerContext.attention_spec``."""
        self.spec = context.attention_spec(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
            has_sinks=has_sinks,
        )
        self.layer_index = len(context.attention_layers)
        self._backend: AttentionBackend | None = None
        self._cache: Tensor | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        self._group_index = 0
        self._sinks: Tensor | None = None
        context.attention_layers.append(self)

    def bind(self, cache: Tensor, backend: AttentionBackend, group_index: int) -> None:
        """Give the layer its cache tensor (``backend.kv_shape()``), backend and index into ``batch.metadata``."""
        self._cache, self._backend, self._group_index = cache, backend, group_index
        self._views = backend.kv_views(cache)

    def set_sinks(self, sinks: Tensor) -> None:
        """Give the layer its sinks ``[H]``, float32; before the first step of a layer that has them."""
        assert self.spec.has_sinks and sinks.dtype is torch.float32
        self._sinks = sinks

    def forward(
        self, qkv: Tensor, rotations: Rotations, batch: ForwardBatch, norms: tuple[RMSNorm, RMSNorm] | None = None
    ) -> Tensor:
        """Rotate queries and keys, write this step's keys and values to the cache, attend.

        Args:
            qkv: ``[T, (H + 2G) * D]``, query heads, key heads, value heads, their rows in ``Rotary.head_order``;
                overwritten.
            rotations: Of the step.
            batch: The step.
            norms: Of each query head and of each key head, before the rotation.

        Returns:
            ``[T, H * D]``.
        """
        assert self._backend is not None and self._cache is not None, "bind() comes before the first step"
        spec, meta = self.spec, batch.metadata[self._group_index]
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        weights = None if norms is None else (norms[0].scale, norms[1].scale, norms[0].eps)
        if meta.takes_projection:
            backend = cast(ProjectionBackend, self._backend)
            out = qkv.new_empty(len(qkv), heads, spec.head_dim)
            prepare = HeadPreparation(weights, rotations.table, rotations.positions)
            backend.attend_projection(qkv, prepare, self._cache, meta, out, self._sinks)
            return out.flatten(1)
        by_head = qkv.view(-1, heads + 2 * kv_heads, spec.head_dim)
        q, k, v = by_head.split((heads, kv_heads, kv_heads), dim=1)
        if self._views is not None:
            norm_rotate_write(
                qkv, heads, kv_heads, weights, rotations.table, rotations.positions, *self._views, meta.slot_mapping
            )
        else:
            if norms is not None:
                q.copy_(norms[0].forward(q))
                k.copy_(norms[1].forward(k))
            rotate_heads(by_head[:, : heads + kv_heads], rotations.rows())
            self._backend.write(k, v, self._cache, meta)
        return self._attend(q, k, v, batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        """As ``forward``, for a model that has prepared queries and keys itself.

        Args:
            q: ``[T, H, D]``, each dense, positions applied.
            k: ``[T, G, D]``.
            v: ``[T, G, D]``.
            batch: The step.

        Returns:
            ``[T, H * D]``.
        """
        assert self._backend is not None and self._cache is not None, "bind() comes before the first step"
        self._backend.write(k, v, self._cache, batch.metadata[self._group_index])
        return self._attend(q, k, v, batch)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> Tensor:
        assert self._backend is not None and self._cache is not None
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        meta = batch.metadata[self._group_index]
        if self._sinks is None:
            self._backend.attend(q, k, v, self._cache, meta, out)
        else:
            self._backend.attend(q, k, v, self._cache, meta, out, sinks=self._sinks)
        return out.flatten(1)

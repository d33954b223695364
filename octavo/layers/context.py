"""LayerContext: what a layer may know besides its own dimensions, and where attention layers announce themselves.

One context per model. Layers read dtype, device and quantisation method from it; attention layers ask it for their
AttentionSpec and are collected in order, so that the worker can bind a cache tensor and a backend to each. Knows
nothing of checkpoints, batches or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from octavo.attention.backend import AttentionSpec
from octavo.quantization.method import QuantizationMethod

if TYPE_CHECKING:
    from octavo.layers.attention import Attention


class LayerContext:
    """Shared by all layers of one model while it is built."""

    def __init__(
        self,
        dtype: torch.dtype,
        quantization: QuantizationMethod,
        block_size: int,
        *,
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype | None = None,
        max_model_len: int | None = None,
        is_bidirectional: bool = False,
    ) -> None:
        """Make a context.

        Args:
            dtype: Of activations and of unquantised weights.
            quantization: How linear layers store and multiply their weights.
            block_size: Tokens per KV block.
            device: Where weights live.
            kv_dtype: Of the KV cache; ``dtype`` when not given.
            max_model_len: Longest sequence, for position tables; the model's own maximum when not given.
            is_bidirectional: Whether every token sees the whole text (encoders).
        """
        self.dtype = dtype
        self.device = torch.device(device)
        self.quantization = quantization
        self.block_size = block_size
        self.kv_dtype = kv_dtype or dtype
        self.max_model_len = max_model_len
        self.is_bidirectional = is_bidirectional
        self.attention_layers: list[Attention] = []
        """In the order of construction, which is the order of execution."""

    def attention_spec(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
        has_sinks: bool = False,
    ) -> AttentionSpec:
        """The spec of one attention layer; ``scale`` is ``head_dim ** -0.5`` when not given. A window that no served
        sequence outgrows is left out."""
        if sliding_window is not None and self.max_model_len is not None and sliding_window >= self.max_model_len:
            sliding_window = None
        return AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            scale=head_dim**-0.5 if scale is None else scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
            has_sinks=has_sinks,
            is_bidirectional=self.is_bidirectional,
        )

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised storage for an unquantised parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

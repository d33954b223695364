"""Linear layers: one product, possibly of several checkpoint tensors stacked into one (q, k, v; gate, up).

How the weight is stored and multiplied is the QuantizationMethod's affair; here are names, shards and the bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.kernels.linear import Activation, gated_linear
from octavo.layers.context import LayerContext
from octavo.layers.parameter import Layer, Parameter
from octavo.layers.stream import Normed, Product, as_tensor
from octavo.quantization.method import LinearShape


class Linear(Layer):
    """``y = x W^T + b`` for ``x [T, in]``."""

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        bias: bool = False,
        row_order: Tensor | None = None,
    ) -> None:
        """Define a layer with empty weights.

        Args:
            context: Of the model.
            in_features: Width of the input.
            out_features: Width of the output, or shard name to width for a fused layer.
            bias: Whether the checkpoint has one.
            row_order: ``[out]`` int64: row ``i`` of the stored weight is row ``row_order[i]`` of the checkpoint's.
        """
        shards = None if isinstance(out_features, int) else dict(out_features)
        rows = out_features if isinstance(out_features, int) else sum(out_features.values())
        self.shape = LinearShape(in_features, rows, context.dtype)
        self._method = context.quantization
        self._row_order = row_order
        self._weights: dict[str, Tensor] = {}
        self._bias: Tensor | None = None
        self._loading: dict[str, Tensor] = {}
        self.weight = Parameter((rows, in_features), self._allocate, self._finish_weight, shards)
        if bias:
            self.bias = Parameter((rows,), lambda: context.empty(rows), self._finish_bias, shards)

    @property
    def plain(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight ``[out, in]`` and bias ``[out]``, as they are; None for a weight in another form, or for no bias."""
        return self._weights.get("weight") if self._method.name == "none" else None, self._bias

    def forward(self, x: Tensor | Normed) -> Tensor:
        """``[T, in] -> [T, out]``."""
        weight, bias = self.plain
        if isinstance(x, Normed) and weight is not None:
            result = x.product(weight, bias)
            if result is not None:
                return result
        return self._method.apply(self.shape, self._weights, as_tensor(x), self._bias)

    def later(self, x: Tensor) -> Product:
        """``forward(x)``, when it is known what it is added to."""
        return Product(self, x)

    def forward_gated(self, x: Tensor | Normed, activation: Activation) -> Tensor:
        """``activation(forward(x))``, ``[T, in] -> [T, out / 2]``, for a layer of a gate and an up of the same size."""
        weight, bias = self.plain
        if weight is None:
            return activation(self.forward(x))
        if isinstance(x, Normed):
            result = x.product(weight, bias, activation)
            if result is not None:
                return result
        return gated_linear(as_tensor(x), weight, bias, activation)

    def _allocate(self) -> Tensor:
        self._loading = self._method.create_weights(self.shape)
        return self._loading["weight"]

    def _finish_weight(self, weight: Tensor) -> None:
        loaded, self._loading = self._loading, {}
        if self._row_order is not None:
            # As the method allocates, which may not be as indexing does.
            loaded["weight"] = self._method.create_weights(self.shape)["weight"]
            torch.index_select(weight, 0, self._row_order.to(weight.device), out=loaded["weight"])
        del weight
        self._weights = self._method.after_load(self.shape, loaded)

    def _finish_bias(self, bias: Tensor) -> None:
        self._bias = bias if self._row_order is None else bias[self._row_order]

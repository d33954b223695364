"""Runs a model over paged batches without engine or worker: what the model tests share."""

from __future__ import annotations

import torch

from octavo.attention.torch_sdpa import TorchSdpaBackend
from octavo.batch import ForwardBatch, StepShape
from octavo.config.model import ModelConfig
from octavo.layers.context import LayerContext
from octavo.models.registry import build_model
from octavo.quantization.method import QuantizationMethod
from octavo.quantization.unquantized import Unquantized

BLOCK_SIZE = 16
torch.set_num_threads(1)  # threads cost more than they save on tiny models


class PagedModel:
    """A model with its cache; requests are numbered, their blocks handed out here."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int = 64,
        scattered: bool = False,
        method: QuantizationMethod | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.context = LayerContext(dtype, method or Unquantized(), BLOCK_SIZE)
        self.model = build_model(config, self.context)
        self._backends = {}
        for layer in self.context.attention_layers:
            backend = self._backends.setdefault(layer.spec, TorchSdpaBackend(layer.spec))
            cache = torch.full(backend.kv_shape(num_blocks), float("nan"), dtype=layer.spec.kv_dtype)
            layer.bind(cache, backend, list(self._backends).index(layer.spec))
        order = torch.arange(1, num_blocks)
        if scattered:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(1))]
        self._free = order.tolist()
        self._blocks: dict[int, list[int]] = {}
        self._lens: dict[int, int] = {}

    def step(self, work: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Feed new token ids of each request; returns the logits ``[tokens, V]`` of all of them."""
        ids, positions, slots, query_lens, seq_lens = [], [], [], [], []
        for request, tokens in work.items():
            start = self._lens.get(request, 0)
            end = start + len(tokens)
            blocks = self._blocks.setdefault(request, [])
            while len(blocks) * BLOCK_SIZE < end:
                blocks.append(self._free.pop(0))
            ids += tokens
            positions += range(start, end)
            slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, end)]
            query_lens.append(len(tokens))
            seq_lens.append(end)
            self._lens[request] = end
        width = max(len(self._blocks[request]) for request in work) + 2
        table = torch.zeros(len(work), width, dtype=torch.int32)
        for row, request in enumerate(work):
            table[row, : len(self._blocks[request])] = torch.tensor(self._blocks[request])
        shape = StepShape(len(ids), len(work), max(query_lens), max(seq_lens), tuple(query_lens), tuple(seq_lens))
        start_loc = torch.tensor([0, *query_lens]).cumsum(0).int()
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        mapping = torch.tensor(slots)
        batch = ForwardBatch(
            shape=shape,
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            query_start_loc=start_loc,
            seq_lens=lens,
            logits_indices=torch.arange(len(ids)),
            row_index=torch.arange(len(work)),
            metadata=tuple(b.plan(shape, start_loc, lens, table, mapping) for b in self._backends.values()),
        )
        with torch.inference_mode():
            logits = self.model.compute_logits(self.model.forward(batch))
        return dict(zip(work, logits.split(query_lens), strict=True))

    def feed(self, request: int, tokens: list[int], chunk: int) -> torch.Tensor:
        """Feed one request's tokens ``chunk`` at a time; logits of all."""
        return torch.cat([self.step({request: tokens[i : i + chunk]})[request] for i in range(0, len(tokens), chunk)])

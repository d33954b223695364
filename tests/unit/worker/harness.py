"""A model that does arithmetic on its whole history, read from the paged cache: a wrong slot, block, position or token
anywhere changes what it says next. With it, a runner and a little scheduler that counts blocks."""

from __future__ import annotations

from concurrent.futures import Future
from typing import ClassVar

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.batch import AttentionMetadata, ForwardBatch, StepShape
from octavo.device.cpu import CpuDevice
from octavo.messages import ModelRunnerOutput, NewRow, ResolvedSampling, SchedulerOutput
from octavo.models.interface import WeightMap
from octavo.sampling.logits_processor import ProcessorContext
from octavo.sampling.registry import load_processors
from octavo.sampling.sampler import Sampler
from octavo.worker.block_tables import BlockTables
from octavo.worker.cuda_graphs import DecodeGraphs
from octavo.worker.input_batch import InputBatch
from octavo.worker.model_runner import ModelRunner, Recordings
from octavo.worker.outputs import PendingOutput
from octavo.worker.plain_sampling import PlainSampling
from octavo.worker.prompt_graphs import PromptGraphs
from octavo.worker.request_rows import RequestRows

VOCAB = 97
BLOCK = 16
MAX_LEN = 128
ROWS = 8


def next_token(text: list[int]) -> int:
    """What HistoryModel thinks most likely after a text."""
    return sum((i + 1) * (token + 1) for i, token in enumerate(text)) % VOCAB


class PlainBackend:
    """Plans nothing: the metadata are the tensors themselves."""

    name: ClassVar[str] = "PLAIN"

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        return None

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, self.spec.block_size)

    def plan(
        self, step: StepShape, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> AttentionMetadata:
        return AttentionMetadata(slot_mapping, block_table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
        raise AssertionError("HistoryModel has no attention layer")


class HistoryModel:
    """One cache per KV group; every group must tell the same history. Hidden states are [next token]."""

    weight_map: ClassVar[WeightMap] = WeightMap()

    def __init__(self, num_groups: int, num_blocks: int) -> None:
        self.caches = torch.full((num_groups, num_blocks, BLOCK), -(10**6))
        self.largest_logits = 0
        self.broken_token = -1
        """Text whose last token is this one gets NaN logits."""
        self.is_recorded = False
        """Whether steps may be recorded ones."""

    def forward(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        shape = batch.shape
        assert shape.num_tokens == len(batch.input_ids)
        assert shape.is_bound or shape.num_tokens == sum(shape.query_lens)
        # A recorded step knows upper bounds only, and is filled up with requests of length 0.
        lens = batch.seq_lens.tolist()
        assert all(length <= bound for length, bound in zip(lens, shape.seq_lens, strict=True))
        assert all(length == bound or self.is_recorded for length, bound in zip(lens, shape.seq_lens, strict=True))
        said: list[list[int]] = []
        for cache, meta in zip(self.caches, batch.metadata, strict=True):
            written = meta.slot_mapping >= 0
            cache.view(-1)[meta.slot_mapping[written]] = batch.input_ids[written]
            said.append(self._say(cache, meta.block_table, batch))
        assert all(tokens == said[0] for tokens in said)
        return torch.tensor(said[0], dtype=torch.float32).unsqueeze(1)

    def _say(self, cache: Tensor, table: Tensor, batch: ForwardBatch) -> list[int]:
        starts = batch.query_start_loc.tolist()
        tokens: list[int] = []
        for i, seq_len in enumerate(batch.seq_lens.tolist()):
            if starts[i + 1] == starts[i] and batch.shape.is_bound:
                assert seq_len == 0
                continue
            if seq_len == 0:
                assert int(batch.metadata[0].slot_mapping[starts[i]]) == -1 and starts[i + 1] - starts[i] == 1
                tokens.append(-1)
                continue
            history = cache[table[i].long()].flatten()[:seq_len].tolist()
            for place in range(starts[i], starts[i + 1]):
                position = int(batch.positions[place])
                assert (
                    history[position] == int(batch.input_ids[place]) or int(batch.metadata[0].slot_mapping[place]) < 0
                )
                is_broken = history[position] == self.broken_token
                tokens.append(-1 if is_broken else next_token(history[: position + 1]))
        filling = batch.metadata[0].slot_mapping[len(tokens) :]
        assert (filling == -1).all() and (batch.shape.is_bound or not len(filling))
        return tokens + [-1] * len(filling)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.largest_logits = max(self.largest_logits, len(hidden))
        logits = ((torch.arange(VOCAB) * 37) % VOCAB).repeat(len(hidden), 1) / 40.0
        token = hidden[:, 0].long()
        logits.scatter_(1, token.clamp(min=0).unsqueeze(1), 6.0)
        logits[token < 0] = torch.nan
        return logits


class LittleEngine:
    """Keeps texts and blocks, makes plans, applies results. What a scheduler does, without its decisions."""

    def __init__(
        self,
        *,
        num_groups: int = 1,
        num_blocks: int = 200,
        max_logits_rows: int = ROWS,
        processors: tuple[str, ...] = (),
        mode: str = "raw_logprobs",
        device: CpuDevice | None = None,
    ) -> None:
        """``device``: one that says it has graphs gets them."""
        device = device or CpuDevice()
        self.model = HistoryModel(num_groups, num_blocks)
        rows = RequestRows(ROWS, MAX_LEN, device)
        tables = BlockTables(num_groups, ROWS, MAX_LEN, BLOCK, device)
        spec = AttentionSpec(1, 1, 1, BLOCK, torch.float32, torch.float32, 1.0)
        backends = [PlainBackend(spec) for _ in range(num_groups)]
        inputs = InputBatch(rows, tables, backends, device)
        context = ProcessorContext(VOCAB, ROWS, device.torch_device, rows.token_ids, torch.zeros(ROWS).long())
        self.sampler = Sampler(context, mode, load_processors(processors, context))
        self.graphs = self.prompt_graphs = plain = None
        if device.has_graphs:
            self.model.is_recorded = True
            plain = PlainSampling(ROWS, VOCAB, device, has_processors=bool(processors))
            self.graphs = DecodeGraphs(
                self.model, rows, tables, backends, plain, device, max_num_seqs=ROWS, max_model_len=MAX_LEN
            )
            self.prompt_graphs = PromptGraphs(
                self.model, tables, backends, device, max_tokens=64, max_num_seqs=ROWS, max_model_len=MAX_LEN
            )
        self.runner = ModelRunner(
            self.model, inputs, self.sampler, device, vocab_size=VOCAB, max_logits_rows=max_logits_rows,
            plain=plain, recordings=Recordings(self.graphs, self.prompt_graphs),
        )  # fmt: skip
        self.rows = rows
        self.num_groups = num_groups
        generator = torch.Generator().manual_seed(0)
        # Scattered on purpose: consecutive ids would hide a table that is read by the wrong index.
        self.free = [int(block) for block in torch.randperm(num_blocks - 1, generator=generator) + 1]
        self.texts: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[list[int]]] = {}
        self.step_id = 0
        self._new: list[NewRow] = []
        self._removed: list[int] = []

    def add(
        self, row: int, text: list[int], sampling: ResolvedSampling, *, num_prompt: int | None = None, computed: int = 0
    ) -> None:
        """A request takes a row, with the blocks of its text."""
        blocks = [self._take(-(-len(text) // BLOCK)) for _ in range(self.num_groups)]
        for group, ids in enumerate(blocks):  # what a prefix hit finds in its blocks
            slots = [ids[i // BLOCK] * BLOCK + i % BLOCK for i in range(computed)]
            self.model.caches[group].view(-1)[slots] = torch.tensor(text[:computed], dtype=torch.int64)
        self.texts[row], self.computed[row], self.blocks[row] = list(text), computed, blocks
        self._new.append(NewRow(row, list(text), num_prompt or len(text), computed, sampling, [*map(list, blocks)]))

    def remove(self, row: int) -> list[int]:
        """Take a request off its row; its text."""
        self._removed.append(row)
        for ids in self.blocks.pop(row):
            self.free.extend(ids)
        del self.computed[row]
        return self.texts.pop(row)

    def plan(self, work: dict[int, int], **fields: object) -> SchedulerOutput:
        """A step of ``{row: tokens}``."""
        changes: list[tuple[int, int, int]] = []
        for row, count in work.items():
            self.computed[row] += count
            for group, ids in enumerate(self.blocks[row]):
                added = self._take(-(-self.computed[row] // BLOCK) - len(ids))
                ids += added
                changes += [(row, group, block) for block in added]
        plan = SchedulerOutput(
            step_id=self.step_id,
            removed_rows=self._removed,
            new_rows=self._new,
            rows=list(work),
            num_scheduled_tokens=list(work.values()),
            block_rows=[row for row, _, _ in changes],
            block_groups=[group for _, group, _ in changes],
            block_ids=[block for _, _, block in changes],
            **fields,  # type: ignore[arg-type]
        )
        self.step_id += 1
        self._new, self._removed = [], []
        return plan

    def step(self, work: dict[int, int]) -> ModelRunnerOutput:
        """Plan, run and apply one step."""
        plan = self.plan(work)
        with torch.inference_mode():
            output = self.begin(plan).result()
        self.apply(plan, output)
        return output

    def begin(self, plan: SchedulerOutput, mask: bytes | None = None) -> PendingOutput:
        """Run a plan up to its draw."""
        self.runner.apply(plan)
        return self.runner.complete(self.runner.launch(plan), mask)

    def apply(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Append what was drawn."""
        for row, tokens in zip(plan.rows, output.token_ids, strict=True):
            self.texts[row] += tokens

    def _take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]


def done(future: Future[ModelRunnerOutput]) -> ModelRunnerOutput:
    """The result of a step that must have run."""
    assert future.done()
    return future.result()

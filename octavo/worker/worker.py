"""Worker: one device, from empty to answering steps. Implements ``executor.executor.Worker``.

Loads the model, counts memory, makes the cache, then runs steps strictly in the order in which they come: a step that
waits for its grammar mask holds back those behind it. Knows no request and no scheduler. ``model_runner.py`` is a step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from octavo.attention.backend import is_capturable
from octavo.attention.registry import choose_backend
from octavo.config.engine import EngineConfig
from octavo.device.registry import make_device
from octavo.kernels.gpu import gpu_kernels
from octavo.layers.context import LayerContext
from octavo.loader.load import load_weights
from octavo.messages import ModelRunnerOutput, SchedulerOutput
from octavo.models.interface import is_recordable
from octavo.models.pooling import build_pooling_model
from octavo.models.registry import build_model
from octavo.quantization.registry import make_method
from octavo.sampling.logits_processor import ProcessorContext
from octavo.sampling.registry import load_processors
from octavo.sampling.sampler import Sampler
from octavo.worker.block_tables import BlockTables
from octavo.worker.cuda_graphs import DecodeGraphs, make_buckets
from octavo.worker.input_batch import InputBatch
from octavo.worker.memory import (
    GPU_LOGITS_BYTES,
    LOGITS_BYTES,
    bound_activation_bytes,
    bound_graph_bytes,
    bound_kv_bytes,
    check_cache_fits,
    count_weight_bytes,
    group_layers,
    make_kv_spec,
    max_logits_rows,
    reserve_bytes,
)
from octavo.worker.model_runner import PROMPT_PIECE, ModelRunner, Recordings
from octavo.worker.outputs import Pending, StepFuture
from octavo.worker.plain_sampling import PlainSampling
from octavo.worker.pooling_runner import PoolingRunner
from octavo.worker.prompt_graphs import PromptGraphs, longest_recorded
from octavo.worker.report import MemoryReport
from octavo.worker.request_rows import RequestRows

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = (1, 8)
"""Lengths run once before the first request: operators choose and prepare their kernels by shape."""
_GPU_WARM_UP_TOKENS = (1, 8, 64, 1024)
"""Kernels for few and for many rows differ; each is compiled or loaded at its first use."""
_RECORDED_WARM_UP_TOKENS = (1, 1024)
"""Recording runs the steps between."""


class StepRunner(Protocol):
    """What runs steps: ``ModelRunner`` for a model that generates, ``PoolingRunner`` for one that pools."""

    def apply(self, plan: SchedulerOutput, /) -> None: ...
    def launch(self, plan: SchedulerOutput, num_refused: int, /) -> Any: ...
    def complete(self, step: Any, mask: bytes | None, /) -> Pending: ...
    def warm_up(self, num_tokens: int, /) -> None: ...
    def first_steps(self) -> list[Callable[[], object]]: ...
    def record_graphs(self) -> None: ...
    def record_more(self) -> bool: ...
    def shrink(self) -> None: ...


@dataclass(slots=True)
class QueuedStep:
    """A step in order: waiting to be launched, or launched and waiting for its mask."""

    plan: SchedulerOutput
    mask: bytes | None
    future: StepFuture
    launched: Any = None
    """What the runner's ``launch`` returned."""


class Worker:
    """See ``executor.executor.Worker``."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = make_device(config.device.device_type)
        self._device.set_num_threads(config.device.num_threads)
        self._at_start = self._device.memory()
        self._ledger: dict[str, int] = {}
        """Bytes by purpose, in the order in which they are taken."""
        self._kept: dict[str, int] = {}
        """Bytes that are left free, by purpose."""
        self._is_warm = False
        self._queue: deque[QueuedStep] = deque()
        self._runner: StepRunner | None = None

    def load(self) -> MemoryReport:
        """Build the model, stream its weights in, count what is left.

        Raises:
            ConfigError: No attention backend or quantisation method serves this model here.
            CheckpointError: The files do not fit the model.
        """
        config, began = self._config, time.monotonic()
        dtype = torch_dtype(config.device.dtype)
        method = make_method(config.device.quantization, self._device.torch_device)
        self._context = LayerContext(
            dtype,
            method,
            config.cache.block_size,
            device=self._device.torch_device,
            kv_dtype=torch_dtype(config.cache.kv_cache_dtype),
            max_model_len=config.scheduler.max_model_len,
            is_bidirectional=config.pooling is not None and config.pooling.is_encoder,
        )
        with torch.inference_mode():
            self._model = self._build()
            load_weights(self._model, config.load, config.model, self._device)
        self._groups = group_layers(
            (layer.spec for layer in self._context.attention_layers), config.scheduler.max_model_len
        )
        self._kv_spec = make_kv_spec(self._groups, config.cache.block_size)
        chosen = [
            choose_backend(config.device.attention_backend, group.spec, self._device.type) for group in self._groups
        ]
        self._backends = [backend(group.spec) for (backend, _), group in zip(chosen, self._groups, strict=True)]
        weights = count_weight_bytes(self._model)
        activation = self._bound_working_memory(weights, dtype.itemsize)
        memory = self._device.memory()
        available = bound_kv_bytes(memory, config.cache, weights, activation)
        self._ledger = {"weights": weights}
        self._kept = {"activations at most": activation, "reserve": reserve_bytes(memory, config.cache)}
        logger.debug(
            "memory: %d total, %d free, %d weights, %d working memory at most, %d for the KV cache",
            memory.total, memory.free, weights, activation, available,
        )  # fmt: skip
        return MemoryReport(
            kv_spec=self._kv_spec,
            weights_bytes=weights,
            activation_bytes=activation,
            available_kv_bytes=available,
            attention_backend=self._backends[0].name,
            attention_reason=chosen[0][1],
            load_seconds=time.monotonic() - began,
        )

    def _build(self) -> Any:
        """A CausalLM, or a PoolingModel where the engine pools."""
        config = self._config
        if config.pooling is not None:
            return build_pooling_model(config.model, config.pooling, self._context)
        return build_model(config.model, self._context, config.load.model_impl)

    def _bound_working_memory(self, weights: int, dtype_bytes: int) -> int:
        """Everything beside weights and cache: the largest step, rows, recorded steps."""
        config, limits = self._config, self._config.scheduler
        is_gpu = self._device.is_asynchronous
        bound = bound_activation_bytes(
            config.model,
            limits,
            dtype_bytes,
            prompt_piece=PROMPT_PIECE,
            logits_bytes=self._logits_bytes,
            copies_history=not is_gpu or any(getattr(each, "copies_history", False) for each in self._backends),
        )
        if self._records_graphs:
            largest = make_buckets(limits.max_num_seqs)[-1]
            num_blocks = -(-limits.max_model_len // config.cache.block_size) + 1
            prompt_tokens = self._longest_recorded_prompts(weights)
            bound += bound_graph_bytes(config.model, largest, dtype_bytes, num_blocks, prompt_tokens)
        return bound

    def _longest_recorded_prompts(self, weight_bytes: int) -> int:
        num_weights = weight_bytes // torch_dtype(self._config.device.dtype).itemsize
        return longest_recorded(num_weights, self._config.scheduler.max_num_batched_tokens)

    @property
    def _logits_bytes(self) -> int:
        return GPU_LOGITS_BYTES if self._device.is_asynchronous else LOGITS_BYTES

    @property
    def _records_graphs(self) -> bool:
        has_graphs = self._device.has_graphs and not self._config.device.enforce_eager
        if not has_graphs or self._config.pooling is not None or not is_recordable(self._model):
            return False
        return all(is_capturable(backend) for backend in self._backends)

    def allocate(self, num_blocks: int) -> None:
        """Make the cache and everything that lives as long as it: rows, tables, sampler.

        Raises:
            ConfigError: The cache is larger than the device, or a logits processor cannot be loaded.
        """
        assert num_blocks >= 2, "block 0 is the null block"
        config, device = self._config, self._device
        check_cache_fits(device.memory(), num_blocks * self._kv_spec.bytes_per_block)
        self._ledger["KV cache"] = num_blocks * self._kv_spec.bytes_per_block
        logger.info("KV cache: %s", self._kv_spec.describe(config.scheduler.max_model_len))
        self._bind_cache(num_blocks)
        before = device.memory()
        limits = config.scheduler
        rows = RequestRows(limits.max_num_seqs, limits.max_model_len, device)
        tables = BlockTables(
            len(self._groups), limits.max_num_seqs, limits.max_model_len, config.cache.block_size, device
        )
        inputs = InputBatch(rows, tables, self._backends, device)
        self._runner = self._make_runner(inputs) if config.pooling is None else self._make_pooling_runner(inputs)
        if device.is_asynchronous:
            self._ledger["rows"] = max(0, before.free - device.memory().free)

    def _make_runner(self, inputs: InputBatch) -> ModelRunner:
        config, device = self._config, self._device
        limits, vocab_size = config.scheduler, config.model.vocab_size
        context = ProcessorContext(
            vocab_size=vocab_size,
            max_num_seqs=limits.max_num_seqs,
            device=device.torch_device,
            token_ids=inputs.rows.token_ids[:-1],
            num_tokens=device.zeros((limits.max_num_seqs,), torch.int64),
        )
        plain, recordings = None, Recordings()
        if device.is_asynchronous:
            has_processors = bool(config.device.logits_processors)
            plain = PlainSampling(limits.max_num_seqs, vocab_size, device, has_processors=has_processors)
            if self._records_graphs:
                recordings = self._make_recordings(inputs, plain)
        return ModelRunner(
            self._model,
            inputs,
            Sampler(context, config.frontend.logprobs_mode, load_processors(config.device.logits_processors, context)),
            device,
            vocab_size=vocab_size,
            max_logits_rows=max_logits_rows(vocab_size, limits.max_num_seqs, self._logits_bytes),
            plain=plain,
            recordings=recordings,
        )

    def _make_pooling_runner(self, inputs: InputBatch) -> PoolingRunner:
        config = self._config
        assert config.pooling is not None
        return PoolingRunner(
            self._model,
            inputs,
            self._device,
            config.pooling,
            hidden_size=config.model.hidden_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            dtype=self._context.dtype,
        )

    def _make_recordings(self, inputs: InputBatch, plain: PlainSampling) -> Recordings:
        limits = self._config.scheduler
        lengths = {"max_num_seqs": limits.max_num_seqs, "max_model_len": limits.max_model_len}
        decode = DecodeGraphs(self._model, inputs.rows, inputs.tables, self._backends, plain, self._device, **lengths)
        longest = self._longest_recorded_prompts(self._ledger["weights"])
        if not longest:
            return Recordings(decode)
        prompts = PromptGraphs(self._model, inputs.tables, self._backends, self._device, max_tokens=longest, **lengths)
        return Recordings(decode, prompts)

    def warm_up(self) -> bool:
        """See Worker: run the model on short dummy steps and record the first sizes; then, one by one, the others."""
        if self._is_warm:
            return self._record_more()
        self._is_warm = True
        limits = self._config.scheduler
        longest = min(limits.max_num_batched_tokens, limits.max_model_len)
        dry_steps = [partial(self._ready().warm_up, count) for count in self._warm_up_tokens() if count <= longest]
        with torch.inference_mode():
            if self._records_graphs:
                # What may be recorded launches only, so it bears being rehearsed.
                first_steps = [*self._ready().first_steps(), *dry_steps]
                gpu_kernels("ahead").compile_ahead(first_steps, self._config.device.num_threads)
                self._device.free_unused()
            for dry_step in dry_steps:
                dry_step()
            before, begin_s = self._device.memory(), time.monotonic()
            if self._records_graphs:
                logger.info("Capturing CUDA graphs ...")
            self._ready().record_graphs()
        if self._device.is_asynchronous:
            graphs = self._ledger["graphs"] = max(0, before.free - self._device.memory().free)
            if self._records_graphs:
                seconds = time.monotonic() - begin_s
                logger.info("Graph capturing finished in %.1f secs, took %.2f GiB", seconds, graphs / 2**30)
            self._log_ledger()
        return self._records_graphs

    def _record_more(self) -> bool:
        with torch.inference_mode():
            before = self._device.memory() if self._device.is_asynchronous else None
            has_more = self._ready().record_more()
        if before is not None:
            self._ledger["graphs"] += max(0, before.free - self._device.memory().free)
        return has_more

    def _warm_up_tokens(self) -> tuple[int, ...]:
        if not self._device.is_asynchronous:
            return _WARM_UP_TOKENS
        return _GPU_WARM_UP_TOKENS if not self._records_graphs else _RECORDED_WARM_UP_TOKENS

    def _log_ledger(self) -> None:
        """What was counted against what the device says, and what is left for the largest step."""
        now = self._device.memory()
        counted, used = sum(self._ledger.values()), self._at_start.free - now.free
        lines, kept = (
            ", ".join(f"{name} {size / 2**30:.2f}" for name, size in each.items())
            for each in (self._ledger, self._kept)
        )
        logger.info(
            "memory in GiB: %s; together %.2f, the device says %.2f (%+.1f %% of its %.1f); %.2f free for %s",
            lines, counted / 2**30, used / 2**30, 100 * (counted - used) / now.total, now.total / 2**30,
            now.free / 2**30, kept,
        )  # fmt: skip

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        """Queue a step. It is on the device when this returns (on a CPU: it has run), unless it or one before it waits
        for a mask. Nothing here waits for the device."""
        step = QueuedStep(plan, mask, StepFuture())
        self._queue.append(step)
        self._advance()
        return step.future

    def sample(self, step_id: int, mask: bytes | None) -> None:
        """Complete the step that waits for its mask, then run those behind it."""
        step = self._queue[0] if self._queue else None
        assert step is not None and step.launched is not None, f"step {step_id} is not waiting for sample()"
        assert step.plan.step_id == step_id, f"step {step.plan.step_id} comes before {step_id}"
        step.mask = mask
        self._complete(step)
        self._advance()

    def _advance(self) -> None:
        """Run queued steps in order, up to one that must wait."""
        while self._queue and self._queue[0].launched is None:
            step = self._queue[0]
            try:
                with torch.inference_mode():
                    step.launched = self._launch(step.plan)
            except Exception as error:  # the future carries it to the engine, which ends
                self._queue.popleft()
                step.future.set_exception(error)
                continue
            if step.plan.defer_sampling and step.mask is None:
                return
            self._complete(step)

    def _launch(self, plan: SchedulerOutput) -> Any:
        """Launch, with fewer and fewer of the newest requests while memory does not suffice."""
        runner = self._ready()
        runner.apply(plan)
        num_refused = 0
        has_freed = False
        while True:
            try:
                return runner.launch(plan, num_refused)
            except torch.OutOfMemoryError as error:
                self._device.synchronize()
                num_refused += has_freed
                if num_refused > len(plan.rows):
                    raise
                has_freed = True
                logger.warning("out of memory in a step of %d requests: %s", len(plan.rows) - num_refused, error)
            runner.shrink()
            self._device.free_unused()

    def _complete(self, step: QueuedStep) -> None:
        assert step.launched is not None
        self._queue.popleft()
        try:
            with torch.inference_mode():
                step.future.attach(self._ready().complete(step.launched, step.mask))
        except Exception as error:  # as in _advance()
            step.future.set_exception(error)
            return
        if not self._device.is_asynchronous:
            step.future.settle()

    def _bind_cache(self, num_blocks: int) -> None:
        """Cache tensor j serves the j-th layer of every group."""
        layers = self._context.attention_layers
        shapes = [backend.kv_shape(num_blocks) for backend in self._backends]
        longest = max(self._groups, key=lambda group: len(group.layer_indices))
        shape = shapes[self._groups.index(longest)]
        tensors = [self._device.zeros(shape, longest.spec.kv_dtype) for _ in range(self._kv_spec.num_tensors)]
        for group_index, (group, backend) in enumerate(zip(self._groups, self._backends, strict=True)):
            for tensor, layer_index in zip(tensors, group.layer_indices, strict=False):
                layers[layer_index].bind(tensor.view(shapes[group_index]), backend, group_index)

    def _ready(self) -> StepRunner:
        assert self._runner is not None, "allocate() comes before the first step"
        return self._runner


def torch_dtype(name: str) -> torch.dtype:
    """``float32``, ``float16`` or ``bfloat16`` as torch's."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]

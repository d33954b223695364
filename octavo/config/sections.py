"""The resolved settings, one frozen section per reader. No ``auto`` and no None-for-default is left in here.

``EngineArgs`` (``config/args.py``) is what the user typed; ``resolve()`` turns it into these. Sections are passed
narrowly: a constructor takes the section that it reads, never the whole ``EngineConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """KV cache. The number of blocks is not here: it is measured after the weights are loaded."""

    block_size: int
    """Tokens per block: a multiple of 16 in [16, 256]."""
    kv_cache_dtype: str
    """float32, float16 or bfloat16."""
    enable_prefix_caching: bool
    prefix_caching_hash_algo: str
    memory_utilization: float
    """Share of the device's whole memory that this instance may use, weights included: a ceiling."""
    kv_cache_memory_bytes: int | None
    """Given outright, else sized from free memory."""
    num_blocks_override: int | None


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the queue."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    """A prompt gives at most this many tokens to one step; 0 = no limit but the budget."""
    policy: str
    """fcfs, priority or fair, or an import path ``module:Class``."""
    max_num_queued_reqs: int
    max_num_queued_tokens: int
    tenant_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Fair policy: tenant to weight, 1.0 when absent."""
    num_speculative_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Where the weights come from."""

    model: str
    """As the user named it: path, hub name or alias."""
    path: str
    """The local folder or GGUF file that it stands for; empty for ``dummy`` without a checkpoint."""
    load_format: str
    """safetensors, gguf, dummy, or the name of a registered source."""
    revision: str | None
    seed: int
    """Of dummy weights."""
    model_impl: str = "auto"
    """Whose code of the model runs: octavo, transformers, or auto: the former where it exists."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """How the device half computes."""

    device_type: str
    dtype: str
    """Of weights and activations: float32, float16, bfloat16."""
    attention_backend: str
    quantization: str
    """``none`` or the name of a QuantizationMethod."""
    num_threads: int
    enforce_eager: bool
    depth: int
    """Steps in flight: 1 synchronous, 2 overlapped."""
    logits_processors: tuple[str, ...] = ()
    """Import paths ``module:Class`` of further LogitsProcessors."""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Ranks. Only size 1 exists by now; the type is here so that nothing else has to change."""

    tensor_parallel_size: int = 1
    executor: str = "inline"
    """What carries plans to workers: a name in ``executor/registry.py`` or an import path ``module:callable``."""


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """How hidden states become one vector or a few scores per text; an engine that generates has none."""

    task: str
    """``embed`` or ``classify``."""
    pooling_type: str
    """Which states count: CLS (of the first token), LAST, or MEAN of all."""
    activation: str
    """What the result passes through: normalize, softmax, sigmoid or none."""
    is_encoder: bool
    """Every token sees the whole text, which is therefore computed in one piece."""
    num_labels: int = 0
    """Scores of a classifier; 0 for embeddings."""
    labels: tuple[str, ...] = ()
    """Their names, where the model has any."""
    is_lower_case: bool = False
    """Texts are put into small letters before they are tokenised."""


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """What tokenising, templates and request checks need."""

    served_model_names: tuple[str, ...]
    tokenizer: str
    """Local folder or GGUF file."""
    skip_tokenizer_init: bool
    chat_template: str | None
    """A template's text given by the user; None = the tokenizer's own."""
    max_logprobs: int
    logprobs_mode: str
    """raw_logprobs, raw_logits, processed_logprobs or processed_logits."""
    sampling_defaults: Mapping[str, Any]
    """Defaults that a request's fields fall back to, from generation_config and its override."""
    seed: int
    """Of the generator that gives each unseeded request its seed."""
    stream_interval: int = 1
    """Tokens of an answer from one output of a stream to the next."""

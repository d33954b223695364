"""How the memory of a device is divided: weights, working memory of the largest step, KV cache, reserve.

Working memory is computed from the model's dimensions, not measured by running a huge step: the bound is written down
below term by term. Knows no tensor but those it counts; ``config.kv_cache_size`` turns the result into blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from octavo.attention.backend import AttentionSpec
from octavo.config.model import ModelConfig
from octavo.config.sections import CacheConfig, SchedulerConfig
from octavo.device.device import DeviceMemory
from octavo.errors import ConfigError
from octavo.kv_spec import KVCacheSpec, KVGroupSpec, KVKind
from octavo.layers.parameter import Layer

LOGITS_BYTES = 64 * 2**20
"""Float32 logits that may exist at once while drawing (one tensor; the sampler needs a few)."""
GPU_LOGITS_BYTES = 512 * 2**20
"""The same where a product over more rows is faster and memory is large."""
_GRAPH_BYTES = 4 * 2**20
"""What the driver and the allocator take for one recorded step beside its tensors."""
_MAX_GRAPHS = 48
_LOGITS_COPIES = 6
"""Tensors of that size alive at once in the worst case: model dtype, float32, raw copy, scaled, filtered, weights."""
_HIDDEN_COPIES = 6
"""Tensors [T, E] alive at once: residual, normed, layer output, and what an operator makes of them on its way."""
_FFN_COPIES = 2
"""Tensors [T, 2 F] alive at once: gate and up, and their activation in float32."""
_COST_OF_GROUP = 0.02
"""Memory that one KV group less is worth: each has tables, a plan and slots of its own in every step."""
_RESERVE_SHARE = 0.02
_MAX_RESERVE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Attention layers with equal specs that share a block table and a backend."""

    spec: AttentionSpec
    layer_indices: tuple[int, ...]


def group_layers(specs: Iterable[AttentionSpec], max_model_len: int | None = None) -> list[KVGroup]:
    """KV groups, in the order of their first layers.

    Layers with equal specs form one group, or several of one size: a block has a place for every layer of the largest
    group, so a group of few layers beside one of many would leave most of its blocks' memory unused. The size is the
    one with which a request of full length takes least memory; groups beyond the first cost a little time each.

    Args:
        specs: Of all attention layers, in order.
        max_model_len: Longest request; None: one group for all equal specs.
    """
    kinds: dict[AttentionSpec, list[int]] = {}
    for index, spec in enumerate(specs):
        kinds.setdefault(spec, []).append(index)
    size = max((len(indices) for indices in kinds.values()), default=1)
    if max_model_len is not None and len(kinds) > 1:
        size = min(range(1, size + 1), key=lambda size: _cost_of_groups(kinds, size, max_model_len))
    groups = [
        KVGroup(spec, tuple(indices[first : first + size]))
        for spec, indices in kinds.items()
        for first in range(0, len(indices), size)
    ]
    return sorted(groups, key=lambda group: group.layer_indices[0])


def _cost_of_groups(kinds: Mapping[AttentionSpec, Sequence[int]], size: int, max_model_len: int) -> float:
    """Tokens times places of layers that a request of full length holds, with something added for each group."""
    held, num_groups = 0, 0
    for spec, indices in kinds.items():
        count = -(-len(indices) // size)
        window = max_model_len if spec.sliding_window is None else spec.sliding_window + spec.block_size
        held += count * size * min(window, max_model_len)
        num_groups += count
    return held * (1 + _COST_OF_GROUP * num_groups)


def make_kv_spec(groups: Iterable[KVGroup], block_size: int) -> KVCacheSpec:
    """What the control half needs to know of the groups."""
    return KVCacheSpec(
        groups=tuple(
            KVGroupSpec(
                kind=KVKind.SLIDING_WINDOW if _has_window(group.spec) else KVKind.FULL,
                layer_indices=group.layer_indices,
                num_kv_heads=group.spec.num_kv_heads,
                head_dim=group.spec.head_dim,
                bytes_per_element=0 if group.spec.is_bidirectional else group.spec.kv_dtype.itemsize,
                sliding_window=group.spec.sliding_window if _has_window(group.spec) else None,
            )
            for group in groups
        ),
        block_size=block_size,
    )


def _has_window(spec: AttentionSpec) -> bool:
    """Whether blocks leave a window while a text grows; an encoder's text does not grow."""
    return spec.sliding_window is not None and not spec.is_bidirectional


def max_logits_rows(vocab_size: int, max_num_seqs: int, logits_bytes: int = LOGITS_BYTES) -> int:
    """Rows drawn at once, so that float32 logits stay within ``logits_bytes``."""
    return max(1, min(max_num_seqs, logits_bytes // (4 * vocab_size)))


def bound_graph_bytes(
    model: ModelConfig, num_reqs: int, dtype_bytes: int, num_kv_blocks: int, prompt_tokens: int = 0
) -> int:
    """Upper bound of what recorded steps hold: they share the tensors of the largest.

    Args:
        model: Dimensions.
        num_reqs: Of the largest recorded decode step.
        dtype_bytes: Of an activation.
        num_kv_blocks: Most blocks of a request: block tables are gathered.
        prompt_tokens: Of the largest recorded step with prompts.
    """
    logits = num_reqs * model.vocab_size * (dtype_bytes + 3 * 4)
    qkv = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = dtype_bytes * (_HIDDEN_COPIES * model.hidden_size + 3 * model.intermediate_size + qkv)
    layer = max(num_reqs, prompt_tokens) * per_token
    # Partial results of split attention: a few per request and about as many as there are programs at once.
    partial = (2 * num_reqs + 1024) * model.num_heads * (model.head_dim + 1) * 4
    return logits + layer + partial + num_reqs * num_kv_blocks * 4 + _MAX_GRAPHS * _GRAPH_BYTES


def bound_activation_bytes(
    model: ModelConfig,
    scheduler: SchedulerConfig,
    dtype_bytes: int,
    *,
    prompt_piece: int,
    logits_bytes: int = LOGITS_BYTES,
    copies_history: bool = True,
) -> int:
    """Upper bound of what a step needs beside weights and cache.

    The largest step has ``max_num_batched_tokens`` tokens. Layers run one after another, so one layer's tensors count
    once. Attention may copy the scattered history of one request at a time. Logits exist in pieces.
    """
    tokens = scheduler.max_num_batched_tokens
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # qkv twice: the projection, and the rotation or the head-major copy of it; the output of attention once.
    per_token = dtype_bytes * (
        _HIDDEN_COPIES * model.hidden_size + 2 * qkv + model.num_heads * model.head_dim
    ) + _FFN_COPIES * 2 * model.intermediate_size * max(dtype_bytes, 4)
    history = scheduler.max_model_len * 2 * model.num_kv_heads * model.head_dim * dtype_bytes * 2
    if not copies_history:
        history = 0
    rows = max_logits_rows(model.vocab_size, scheduler.max_num_seqs, logits_bytes)
    rows = max(rows, min(prompt_piece, tokens))
    logits = _LOGITS_COPIES * rows * model.vocab_size * 4
    # Histories, tables and the queue of inputs: small, but they grow with the limits.
    inputs = scheduler.max_num_seqs * (scheduler.max_model_len + 1) * 4 + tokens * 8 * 8
    return tokens * per_token + history + logits + inputs


def bound_kv_bytes(memory: DeviceMemory, cache: CacheConfig, weights_bytes: int, activation_bytes: int) -> int:
    """What may become KV cache.

    The smaller of what the ceiling (``memory_utilization`` of all memory) leaves beside weights and working memory,
    and what is really free now, less working memory and a reserve. An amount or a number of blocks that the user gave
    outright is bounded only by what is free.

    Args:
        memory: Measured after the weights were loaded.
        cache: The user's limits.
        weights_bytes: Already taken.
        activation_bytes: Will be taken.
    """
    free = memory.free - activation_bytes - reserve_bytes(memory, cache)
    if _is_outright(cache):
        return max(0, free)
    ceiling = int(memory.total * cache.memory_utilization) - weights_bytes - activation_bytes
    return max(0, min(ceiling, free))


def reserve_bytes(memory: DeviceMemory, cache: CacheConfig) -> int:
    """What is left alone: nothing where the user gave the size of the KV cache outright."""
    return 0 if _is_outright(cache) else min(_MAX_RESERVE_BYTES, int(memory.total * _RESERVE_SHARE))


def _is_outright(cache: CacheConfig) -> bool:
    return cache.kv_cache_memory_bytes is not None or cache.num_blocks_override is not None


def check_cache_fits(memory: DeviceMemory, wanted_bytes: int) -> None:
    """Refuse a cache that is larger than the device.

    Raises:
        ConfigError: It is.
    """
    if wanted_bytes > memory.total:
        raise ConfigError(
            f"a KV cache of {wanted_bytes / 2**30:.1f} GiB does not fit into {memory.total / 2**30:.1f} GiB of memory; "
            "lower kv_cache_memory_bytes, num_gpu_blocks_override or max_model_len",
            param="kv_cache_memory_bytes",
        )


def count_weight_bytes(model: object) -> int:
    """Bytes of all tensors that hang on the layers of a model; storage shared by several counts once."""
    seen: set[int] = set()
    total = 0
    waiting: list[object] = [model]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Tensor):
            total += _storage_bytes(node, seen)
        elif isinstance(node, Layer):
            waiting.extend(vars(node).values())
        elif isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list | tuple):
            waiting.extend(node)
        elif isinstance(node, Module):
            waiting.extend([*node.parameters(), *node.buffers()])
    return total


def _storage_bytes(tensor: Tensor, seen: set[int]) -> int:
    """Of the whole storage, once; of the elements where the layout is opaque (a oneDNN tensor)."""
    if tensor.is_mkldnn:
        return tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()

"""The tensors of one step: built by ``worker/input_batch.py``, read by models, layers and attention backends.

Shape legend of the whole repository: T tokens in the step, B requests, L positions with logits, V vocabulary,
E hidden size, F feed-forward size, H query heads, G KV heads, D head size, N blocks, P block size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepShape:
    """Host integers of a step, known before its tensors."""

    num_tokens: int
    num_reqs: int
    max_query_len: int
    max_seq_len: int
    query_lens: tuple[int, ...]
    """[B] scheduled tokens of each request."""
    seq_lens: tuple[int, ...]
    """[B] tokens of each request whose keys are in the cache after this step. Upper bounds under speculation."""
    is_bound: bool = False
    """The step is being recorded: tokens and requests are upper bounds, of any mixture of prompts and decodes; what is
    really there, requests without tokens included, is on the device at each replay."""


@dataclass(slots=True)
class AttentionMetadata:
    """What a backend needs for one KV group in one step; backends subclass it with what ``plan()`` prepared."""

    slot_mapping: Tensor
    """[T] int64, ``block_id * block_size + offset`` of each token; -1 = padding, not written."""
    block_table: Tensor
    """[B, max_blocks] int32 block ids of each request. Entries beyond its length, or before its window, are left over
    from what was there before: they may name blocks of others, or of itself at another place."""

    @property
    def takes_projection(self) -> bool:
        """Whether ``attend_projection`` of the backend does this step, and not ``write`` and ``attend``."""
        return False


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything that a forward pass reads besides weights and cache. An argument of every layer that needs it."""

    shape: StepShape
    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    query_start_loc: Tensor
    """[B + 1] int32."""
    seq_lens: Tensor
    """[B] int32, this step's tokens included."""
    logits_indices: Tensor
    """[L] int64, token positions that need logits."""
    row_index: Tensor
    """[B] int64, batch position to row."""
    metadata: tuple[AttentionMetadata, ...]
    """One per KV group."""
    token_types: Tensor | None = None
    """[T] int64, 1 in the second text of a pair; None where no request of the step is one. Pooling models only."""

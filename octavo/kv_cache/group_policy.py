"""How each kind of attention uses blocks: what a prefix hit needs, and what may be dropped while running.

A *table* lists the blocks of one sequence in one KV group, one per ``block_size`` tokens, in order. Where attention
can no longer look, the table lists the null block. A policy answers three questions about such tables and changes
nothing; ``manager.py`` asks and acts. To add a kind of attention, see docs/extending/kv-group-policy.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from octavo.kv_cache.block_pool import Block, BlockPool
from octavo.kv_spec import KVGroupSpec, KVKind


class KVGroupPolicy(Protocol):
    """One KV group of one model."""

    def longest_hit(self, hashes: Sequence[bytes], pool: BlockPool) -> list[Block]:
        """The table of the longest prefix, in whole blocks, that can be taken from the cache.

        Args:
            hashes: Chain of the sequence; the hit may not be longer. A policy must accept any shorter chain too, and
                answer with a hit of its own for it: several groups agree by shortening.
            pool: Where to look. No references are taken.

        Returns:
            One block per block of the hit, the null block where attention will never look.
        """
        ...

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of this length must be able to hold at once to be computed token by token."""
        ...

    def droppable(self, blocks: Sequence[Block], num_computed_tokens: int) -> list[int]:
        """Table indices of blocks that no later token will look at; those that are the null block already left out.

        Args:
            blocks: The table.
            num_computed_tokens: Tokens whose keys and values are written; the next query stands at this position.
        """
        ...


class FullPolicy:
    """Every token sees all before it."""

    def __init__(self, spec: KVGroupSpec, group_index: int, block_size: int) -> None:
        assert spec.kind is KVKind.FULL
        self._group_index = group_index
        self._block_size = block_size

    def longest_hit(self, hashes: Sequence[bytes], pool: BlockPool) -> list[Block]:
        """Blocks from the start up to the first that is missing."""
        hit: list[Block] = []
        for block_hash in hashes:
            block = pool.find(block_hash, self._group_index)
            if block is None:
                break
            hit.append(block)
        return hit

    def num_blocks_for(self, num_tokens: int) -> int:
        """All of them."""
        return -(-num_tokens // self._block_size)

    def droppable(self, blocks: Sequence[Block], num_computed_tokens: int) -> list[int]:  # noqa: ARG002
        """Nothing, ever."""
        return []


class SlidingWindowPolicy:
    """A token sees itself and the ``sliding_window - 1`` tokens before it."""

    def __init__(self, spec: KVGroupSpec, group_index: int, block_size: int) -> None:
        assert spec.sliding_window is not None
        self._group_index = group_index
        self._block_size = block_size
        self._num_visible = spec.sliding_window - 1
        """Tokens before a query that it sees."""

    def longest_hit(self, hashes: Sequence[bytes], pool: BlockPool) -> list[Block]:
        """The rightmost run of cached blocks long enough to hold the window behind it, or one that starts at 0."""
        num_blocks_of_window = -(-self._num_visible // self._block_size)
        run: list[Block] = []  # last block first
        end = len(hashes)
        for index in range(len(hashes) - 1, -1, -1):
            if len(run) >= num_blocks_of_window:
                break
            block = pool.find(hashes[index], self._group_index)
            if block is None:
                run.clear()
                end = index
            else:
                run.append(block)
        return [pool.null_block] * (end - len(run)) + run[::-1]

    def num_blocks_for(self, num_tokens: int) -> int:
        """At most the window and the query itself, which may straddle one block more."""
        return min(-(-num_tokens // self._block_size), -(-self._num_visible // self._block_size) + 1)

    def droppable(self, blocks: Sequence[Block], num_computed_tokens: int) -> list[int]:
        """Blocks that end before the window of the next query begins."""
        index = max(0, num_computed_tokens - self._num_visible) // self._block_size - 1
        dropped: list[int] = []
        # Everything before a dropped block has been dropped before: look back only as far as something is left.
        while index >= 0 and blocks[index].block_id != 0:
            dropped.append(index)
            index -= 1
        return dropped


_POLICIES: dict[KVKind, type[FullPolicy] | type[SlidingWindowPolicy]] = {
    KVKind.FULL: FullPolicy,
    KVKind.SLIDING_WINDOW: SlidingWindowPolicy,
}


def make_group_policy(spec: KVGroupSpec, group_index: int, block_size: int) -> KVGroupPolicy:
    """The policy for one group of a ``KVCacheSpec``."""
    return _POLICIES[spec.kind](spec, group_index, block_size)

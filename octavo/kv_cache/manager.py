"""Where each sequence's keys and values live: match a prefix, allocate blocks, commit full ones, free.

All that the scheduler ever calls. One table per KV group and sequence, all of the same length; blocks out of a
sliding window are replaced by the null block and go back to the pool while the sequence runs. Full blocks become
findable by others only when their step has come back (``commit``), so nobody reads what is not written yet.

Knows tokens and blocks; nothing of requests, steps, rows or time. Freed blocks may be handed out while a step that
uses them is still in flight: steps run in order on the device, so the new owner writes after the old one has read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from octavo.config.sections import CacheConfig
from octavo.kv_cache.block_pool import Block, BlockPool
from octavo.kv_cache.group_policy import KVGroupPolicy, make_group_policy
from octavo.kv_cache.hashing import BlockHasher
from octavo.kv_spec import KVCacheSpec


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """Where one sequence lives. Lasts from ``open`` on, over preemptions; only ``KVCacheManager`` writes to it."""

    token_ids: list[int]
    """Known tokens; the list of the sequence's owner, who appends to it. Read only here."""
    root: bytes
    """Parent hash of the first block."""
    tables: list[list[Block]]
    """Per KV group; empty while the sequence is not in the cache."""
    hashes: list[bytes] = field(default_factory=list[bytes])
    """One per full block of known tokens, as far as hashed yet."""
    num_slots: int = 0
    """Tokens that the tables have room for."""
    num_committed_blocks: int = 0
    """Leading blocks that have been offered to the cache."""
    next_commit_tokens: int = 0
    """``commit`` has something to do once this many tokens are computed."""

    def block_ids(self) -> list[list[int]]:
        """The tables as integers, for the worker."""
        return [[block.block_id for block in table] for table in self.tables]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What the cache has of a sequence. Valid until anything else is called on the manager."""

    tables: list[list[Block]]
    num_tokens: int
    """A multiple of the block size, less than the sequence's length."""
    num_blocks_to_revive: int
    """Blocks of the hit that are free now and would be taken out of the free list."""


class KVCacheManager:
    """The KV cache of one engine."""

    def __init__(
        self,
        config: CacheConfig,
        spec: KVCacheSpec,
        num_blocks: int,
        *,
        policies: Sequence[KVGroupPolicy] | None = None,
        hash_secret: bytes | None = None,
    ) -> None:
        """
        Args:
            config: Whether and how prefixes are cached.
            spec: KV groups and block size.
            num_blocks: Size of the pool, the null block included.
            policies: One per group of ``spec``, instead of those that its kinds name.
            hash_secret: See ``BlockHasher``.

        Raises:
            ConfigError: The hash algorithm is unknown.
        """
        self.block_size = spec.block_size
        self.num_groups = len(spec.groups)
        self._pool = BlockPool(num_blocks, self.num_groups)
        if policies is None:
            policies = [make_group_policy(group, index, spec.block_size) for index, group in enumerate(spec.groups)]
        assert len(policies) == self.num_groups
        self._policies = list(policies)
        self._is_caching = config.enable_prefix_caching
        self._hasher = BlockHasher(config.prefix_caching_hash_algo, spec.block_size, hash_secret)

    @property
    def num_blocks(self) -> int:
        """The whole pool, the null block included."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be handed out now, cached ones included."""
        return self._pool.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks findable by hash, held or not."""
        return self._pool.num_cached_blocks

    # ------------------------------------------------------------------------------------------------------- sizes

    def num_blocks_for(self, num_tokens: int, *, at_once: bool) -> int:
        """Blocks that a sequence needs to reach this length, alone in the cache.

        Args:
            num_tokens: Tokens whose keys and values are stored.
            at_once: Whether all of them may be computed in one step, so that no block can be dropped before.
        """
        if at_once:
            return self.num_groups * -(-num_tokens // self.block_size)
        return sum(policy.num_blocks_for(num_tokens) for policy in self._policies)

    def num_free_needed(self, hit: PrefixHit, num_tokens: int) -> int:
        """Free blocks that a sequence which starts with ``hit`` needs to come to ``num_tokens``."""
        needed = hit.num_blocks_to_revive
        for policy, table in zip(self._policies, hit.tables, strict=True):
            num_held = sum(block is not self._pool.null_block for block in table)
            needed += max(0, policy.num_blocks_for(num_tokens) - num_held)
        return needed

    def reach(self, blocks: SequenceBlocks | PrefixHit) -> int:
        """Tokens that the tables would have room for if all free blocks went to them."""
        num_free = self._pool.num_free_blocks
        if isinstance(blocks, PrefixHit):
            num_free = max(0, num_free - blocks.num_blocks_to_revive)
        return (len(blocks.tables[0]) + num_free // self.num_groups) * self.block_size

    # ------------------------------------------------------------------------------------------------------- verbs

    def open(self, token_ids: list[int], lora_name: str | None, cache_salt: str | None) -> SequenceBlocks:
        """Make the books of a sequence; nothing is allocated and nothing hashed yet."""
        root = self._hasher.root(lora_name, cache_salt) if self._is_caching else b""
        return SequenceBlocks(token_ids, root, [[] for _ in self._policies])

    def no_hit(self) -> PrefixHit:
        """What ``match`` returns when nothing is found, for sequences that may not read the cache."""
        return PrefixHit([[] for _ in self._policies], 0, 0)

    def match(self, blocks: SequenceBlocks) -> PrefixHit:
        """Find the longest prefix that all groups have; at least the last known token is left to compute."""
        assert not blocks.num_slots, "match is for sequences that are not in the cache"
        num_known = len(blocks.token_ids)
        length = (num_known - 1) // self.block_size
        if not self._is_caching or length <= 0:
            return self.no_hit()
        self._hasher.extend(blocks.hashes, blocks.root, blocks.token_ids, num_known)
        hashes = blocks.hashes[:length]
        while True:
            tables: list[list[Block]] = []
            for policy in self._policies:
                table = policy.longest_hit(hashes, self._pool)
                tables.append(table)
                if len(table) < len(hashes):
                    break
            if len(self._policies) == 1 or len(tables[-1]) == len(hashes):
                break
            # A group has less: the others must agree to a length that is a hit for them too.
            hashes = hashes[: len(tables[-1])]
        num_to_revive = sum(block.ref_count == 0 for table in tables for block in table)
        return PrefixHit(tables, len(tables[-1]) * self.block_size, num_to_revive)

    def start(self, blocks: SequenceBlocks, hit: PrefixHit, num_tokens: int) -> bool:
        """Bring a sequence into the cache: take over the hit, and allocate up to ``num_tokens`` slots in all.

        Returns:
            False, with nothing changed, when there are too few free blocks.
        """
        assert not blocks.num_slots and num_tokens > hit.num_tokens
        if self.reach(hit) < num_tokens:
            return False
        for table in hit.tables:
            self._pool.hold(table)
        blocks.tables = hit.tables
        blocks.num_slots = hit.num_tokens
        blocks.num_committed_blocks = hit.num_tokens // self.block_size
        blocks.next_commit_tokens = hit.num_tokens + self.block_size
        return self.grow(blocks, num_tokens) is not None

    def grow(self, blocks: SequenceBlocks, num_tokens: int) -> list[list[Block]] | None:
        """Append blocks until the tables have room for ``num_tokens``.

        Returns:
            The new blocks per group; None, with nothing changed, when there are too few free ones.
        """
        count = -(-num_tokens // self.block_size) - len(blocks.tables[0])
        if count * self.num_groups > self._pool.num_free_blocks:
            return None
        added: list[list[Block]] = []
        for table in blocks.tables:
            added.append(self._pool.take(count))
            table.extend(added[-1])
        blocks.num_slots = len(blocks.tables[0]) * self.block_size
        return added

    def commit(self, blocks: SequenceBlocks, num_computed_tokens: int) -> None:
        """Note that so many tokens are written: offer full blocks to the cache, drop those out of every window."""
        num_full = num_computed_tokens // self.block_size
        if self._is_caching and num_full > blocks.num_committed_blocks:
            self._hasher.extend(blocks.hashes, blocks.root, blocks.token_ids, num_computed_tokens)
            for index in range(blocks.num_committed_blocks, num_full):
                for group_index, table in enumerate(blocks.tables):
                    self._pool.make_findable(table[index], blocks.hashes[index], group_index)
        blocks.num_committed_blocks = num_full
        blocks.next_commit_tokens = (num_full + 1) * self.block_size
        for policy, table in zip(self._policies, blocks.tables, strict=True):
            for index in policy.droppable(table, num_computed_tokens):
                self._pool.release((table[index],))
                table[index] = self._pool.null_block

    def free(self, blocks: SequenceBlocks) -> None:
        """Give all blocks back, the end of the sequence first. Its hashes stay, for when it comes again."""
        for index in range(len(blocks.tables[0]) - 1, -1, -1):
            self._pool.release(table[index] for table in blocks.tables)
        blocks.tables = [[] for _ in self._policies]
        blocks.num_slots = 0
        blocks.num_committed_blocks = 0

    def distrust(self, blocks: SequenceBlocks) -> None:
        """Let nobody find any block of this history any more; those who share some of them keep them."""
        for block_hash in blocks.hashes:
            for group_index in range(self.num_groups):
                block = self._pool.find(block_hash, group_index)
                if block is not None:
                    self._pool.make_unfindable(block)

    def reset(self) -> bool:
        """Forget all cached prefixes. False, with nothing changed, while any sequence is in the cache."""
        return self._pool.forget_all()

    def check(self, live: Iterable[SequenceBlocks]) -> None:
        """Check every book against the sequences that are in the cache.

        Raises:
            AssertionError: A block is leaked, held twice, free and held, or cached under a wrong hash.
        """
        references: dict[int, int] = {}
        for blocks in live:
            assert len({len(table) for table in blocks.tables}) == 1, "tables of different lengths"
            assert blocks.num_slots == len(blocks.tables[0]) * self.block_size, "slots and tables disagree"
            for table in blocks.tables:
                for index, block in enumerate(table):
                    if block is self._pool.null_block:
                        continue
                    references[block.block_id] = references.get(block.block_id, 0) + 1
                    assert block.block_hash is None or block.block_hash == blocks.hashes[index], (
                        f"{block} is cached under the hash of another history"
                    )
        self._pool.check(references)

"""The blocks of the KV cache: who is free, who is held by how many, and who is findable by hash.

All ``Block`` objects are made once. Free ones hang in a doubly linked list that runs through the objects themselves,
least recently used first, so that a block in the middle can be taken back in constant time when a prefix hits it. A
free block keeps its hash and stays findable until it is handed out again.

Knows nothing of requests, tokens or attention: tables are made of these blocks by ``manager.py``. The memory behind a
block id belongs to the worker. Paper: Kwon et al., SOSP 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable

NULL_BLOCK_ID = 0
"""Stands in tables where a block was dropped; never handed out, never written, never read."""


class Block:
    """One block of KV memory. All fields are written by ``BlockPool`` only."""

    __slots__ = ("block_hash", "block_id", "group_index", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        """Sequences that list this block."""
        self.block_hash: bytes | None = None
        """Set while the block is findable."""
        self.group_index = 0
        """KV group under which it is findable."""
        self.prev: Block = self
        self.next: Block = self
        """Neighbours in the free list; itself when not in it."""

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count}, is_cached={self.block_hash is not None})"


class BlockPool:
    """A fixed number of blocks shared by all KV groups.

    Attributes:
        num_blocks: All blocks, the null block included.
        num_free_blocks: Blocks that ``take`` could hand out, cached ones included.
        null_block: Block 0.
    """

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        assert num_blocks >= 2, "one block besides the null block at least"
        self.num_blocks = num_blocks
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.null_block = self._blocks[NULL_BLOCK_ID]
        self.null_block.ref_count = 1
        self._cached: list[dict[bytes, Block]] = [{} for _ in range(num_groups)]
        # A sentinel closes the list to a ring: its next is the block to hand out first, its prev the last.
        self._sentinel = Block(-1)
        self.num_free_blocks = 0
        for block in self._blocks[1:]:
            self._insert_before(self._sentinel, block)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks findable by hash, held or not."""
        return sum(len(cached) for cached in self._cached)

    def find(self, block_hash: bytes, group_index: int) -> Block | None:
        """The block of this group that holds this history, held or free. Takes no reference."""
        return self._cached[group_index].get(block_hash)

    def take(self, count: int) -> list[Block]:
        """Hand out free blocks with one reference each, least recently used first; they are not findable any more.

        The caller has looked at ``num_free_blocks``.
        """
        assert 0 <= count <= self.num_free_blocks, (count, self.num_free_blocks)
        taken: list[Block] = []
        for _ in range(count):
            block = self._sentinel.next
            self._unlink(block)
            if block.block_hash is not None:
                self.make_unfindable(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def hold(self, blocks: Iterable[Block]) -> None:
        """Take one more reference on each, bringing free ones back. The null block is passed over."""
        for block in blocks:
            if block is self.null_block:
                continue
            if block.ref_count == 0:
                self._unlink(block)
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Give back one reference on each; the null block is passed over.

        Of the findable blocks that become free, the first given is handed out again first: give a sequence from its
        end, so that the beginning of a prefix outlives its tail. Blocks that nobody can find go before all others.
        """
        for block in blocks:
            if block is self.null_block:
                continue
            assert block.ref_count > 0, f"{block} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._insert_before(self._sentinel.next if block.block_hash is None else self._sentinel, block)

    def make_findable(self, block: Block, block_hash: bytes, group_index: int) -> None:
        """Let others find a full block by the hash of its history. The first block of a hash keeps it."""
        assert block.ref_count > 0 and block.block_hash is None, block
        cached = self._cached[group_index]
        if block_hash not in cached:
            cached[block_hash] = block
            block.block_hash = block_hash
            block.group_index = group_index

    def make_unfindable(self, block: Block) -> None:
        """Take a findable block out of the map."""
        assert block.block_hash is not None, block
        del self._cached[block.group_index][block.block_hash]
        block.block_hash = None

    def forget_all(self) -> bool:
        """Make every block unfindable. Refused (False) while any is held: its holder would go on adding to it."""
        if self.num_free_blocks != self.num_blocks - 1:
            return False
        for cached in self._cached:
            for block in cached.values():
                block.block_hash = None
            cached.clear()
        return True

    def check(self, references: dict[int, int]) -> None:
        """Walk all books.

        Args:
            references: Block id to the number of tables entries that list it; absent means 0.

        Raises:
            AssertionError: free + held is not all, a count is wrong, the list or the map is broken.

        Cost: linear in ``num_blocks``, about a microsecond each.
        """
        free: set[int] = set()
        block = self._sentinel
        while True:
            assert block.next.prev is block, f"free list broken behind {block}"
            block = block.next
            if block is self._sentinel:
                break
            assert block.block_id not in free, f"{block} is twice in the free list"
            free.add(block.block_id)
        assert len(free) == self.num_free_blocks, f"{len(free)} in the free list, {self.num_free_blocks} counted"
        assert self.null_block.ref_count == 1 and NULL_BLOCK_ID not in free, "the null block was handed out"
        num_cached = 0
        for block in self._blocks[1:]:
            wanted = references.get(block.block_id, 0)
            assert block.ref_count == wanted, f"{block} is listed {wanted} times"
            assert (block.ref_count == 0) == (block.block_id in free), f"{block} is both free and held, or neither"
            if block.block_hash is not None:
                num_cached += 1
                assert self._cached[block.group_index].get(block.block_hash) is block, f"{block} is not under its hash"
        assert num_cached == self.num_cached_blocks, f"{num_cached} blocks have a hash, {self.num_cached_blocks} in map"

    def _insert_before(self, place: Block, block: Block) -> None:
        assert block.next is block, f"{block} is in the free list already"
        block.prev, block.next = place.prev, place
        place.prev.next = block
        place.prev = block
        self.num_free_blocks += 1

    def _unlink(self, block: Block) -> None:
        assert block.next is not block, f"{block} is not in the free list"
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = block
        self.num_free_blocks -= 1

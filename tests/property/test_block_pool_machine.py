"""The block pool against an oracle of plain lists and dicts, over random calls. Red when a block is leaked, freed
twice, evicted in another order, found after its content is gone, or not found although it is there."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.kv_cache.block_pool import Block, BlockPool

NUM_BLOCKS = 9
NUM_GROUPS = 2
NAMES = [b"x", b"y", b"z"]


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, NUM_GROUPS)
        self.free = list(range(1, NUM_BLOCKS))
        self.references: dict[int, int] = {}
        self.cached: dict[tuple[int, bytes], int] = {}
        self.holders: list[list[Block]] = []

    def is_cached(self, block_id: int) -> bool:
        return block_id in self.cached.values()

    @rule(count=st.integers(0, 5), is_findable=st.booleans(), group=st.integers(0, NUM_GROUPS - 1))
    def take(self, count: int, is_findable: bool, group: int) -> None:
        if count > len(self.free):
            return
        blocks = self.pool.take(count)
        wanted, self.free = self.free[:count], self.free[count:]
        assert [block.block_id for block in blocks] == wanted
        self.cached = {key: block_id for key, block_id in self.cached.items() if block_id not in wanted}
        self.references |= dict.fromkeys(wanted, 1)
        self.holders.append(blocks)
        if is_findable:
            for block, name in zip(blocks, NAMES, strict=False):
                self.pool.make_findable(block, name, group)
                self.cached.setdefault((group, name), block.block_id)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), from_the_end=st.booleans())
    def release(self, data: st.DataObject, from_the_end: bool) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if from_the_end:
            blocks = blocks[::-1]
        self.pool.release(blocks)
        for block in blocks:
            if block is self.pool.null_block:
                continue
            self.references[block.block_id] -= 1
            if self.references[block.block_id] == 0:
                self.free.insert(len(self.free) if self.is_cached(block.block_id) else 0, block.block_id)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), group=st.integers(0, NUM_GROUPS - 1), name=st.sampled_from(NAMES))
    def make_findable(self, data: st.DataObject, group: int, name: bytes) -> None:
        blocks = self.holders[data.draw(st.integers(0, len(self.holders) - 1))]
        blocks = [b for b in blocks if b is not self.pool.null_block and not self.is_cached(b.block_id)]
        if not blocks:
            return
        self.pool.make_findable(blocks[0], name, group)
        self.cached.setdefault((group, name), blocks[0].block_id)

    @rule(group=st.integers(0, NUM_GROUPS - 1), name=st.sampled_from(NAMES), with_null=st.booleans())
    def find_and_hold(self, group: int, name: bytes, with_null: bool) -> None:
        block = self.pool.find(name, group)
        assert (None if block is None else block.block_id) == self.cached.get((group, name))
        if block is None:
            return
        blocks = [self.pool.null_block, block] if with_null else [block]
        self.pool.hold(blocks)
        self.holders.append(blocks)
        self.references[block.block_id] = self.references.get(block.block_id, 0) + 1
        if block.block_id in self.free:
            self.free.remove(block.block_id)

    @rule()
    def forget_all(self) -> None:
        is_idle = len(self.free) == NUM_BLOCKS - 1
        assert self.pool.forget_all() == is_idle
        if is_idle:
            self.cached = {}

    @invariant()
    def books(self) -> None:
        self.pool.check({block_id: count for block_id, count in self.references.items() if count})
        assert self.pool.num_free_blocks == len(self.free)
        assert self.pool.num_cached_blocks == len(self.cached)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40)

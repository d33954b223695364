"""The KV cache against an oracle that remembers what each block really holds, over random lives of sequences.

The oracle knows for every block id which tokens were committed to it, under which salt and in which group, and works
out the longest allowed hit by trying every length, position by position. Red when a hit is wrong, too short, or covers
the last token; when groups do not agree; when a block is leaked or dropped too early."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.kv_cache.block_pool import Block
from octavo.kv_cache.manager import KVCacheManager, PrefixHit, SequenceBlocks
from tests.simulation.configs import cache_config, kv_spec

Content = tuple[int, str | None, tuple[int, ...]]
"""Group, salt, and all tokens up to the end of the block."""

STEMS = [[0] * 14, [0] * 5 + [1] * 9]
TOKENS = st.builds(lambda stem, length: stem[:length], st.sampled_from(STEMS), st.integers(1, 14))


class Sequence:
    """One sequence as the oracle sees it."""

    def __init__(self, blocks: SequenceBlocks, salt: str | None) -> None:
        self.blocks = blocks
        self.salt = salt
        self.num_computed = 0

    @property
    def is_in_cache(self) -> bool:
        return self.blocks.num_slots > 0


class KVCacheMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 3),
        windows=st.sampled_from([(None,), (4,), (None, 3), (None, 2, 6)]),
        num_blocks=st.integers(6, 30),
    )
    def build(self, block_size: int, windows: tuple[int | None, ...], num_blocks: int) -> None:
        self.windows = windows
        self.block_size = block_size
        self.manager = KVCacheManager(cache_config(block_size), kv_spec(block_size, *windows), num_blocks)
        self.sequences: list[Sequence] = []
        self.contents: dict[int, Content] = {}

    def pick(self, data: st.DataObject, is_in_cache: bool) -> Sequence | None:
        choices = [sequence for sequence in self.sequences if sequence.is_in_cache == is_in_cache]
        return data.draw(st.sampled_from(choices)) if choices else None

    def content(self, sequence: Sequence, group: int, index: int) -> Content:
        return group, sequence.salt, tuple(sequence.blocks.token_ids[: (index + 1) * self.block_size])

    def handed_out(self, tables: list[list[Block]]) -> None:
        for table in tables:
            for block in table:
                assert block.block_id > 0
                self.contents.pop(block.block_id, None)

    @rule(tokens=TOKENS, salt=st.sampled_from([None, "a"]))
    def open(self, tokens: list[int], salt: str | None) -> None:
        if len(self.sequences) < 6:
            self.sequences.append(Sequence(self.manager.open(tokens, None, salt), salt))

    def longest_hit(self, sequence: Sequence) -> int:
        """Tokens, by definition."""
        known = set(self.contents.values())
        for length in range((len(sequence.blocks.token_ids) - 1) // self.block_size, 0, -1):
            end = length * self.block_size
            if all(
                self.content(sequence, group, position // self.block_size) in known
                for group, window in enumerate(self.windows)
                for position in range(0 if window is None else max(0, end - window + 1), end)
            ):
                return end
        return 0

    def check_hit(self, sequence: Sequence, hit: PrefixHit) -> None:
        assert hit.num_tokens == self.longest_hit(sequence)
        for group, table in enumerate(hit.tables):
            assert len(table) * self.block_size == hit.num_tokens
            for index, block in enumerate(table):
                if block.block_id:
                    assert self.contents[block.block_id] == self.content(sequence, group, index)

    @rule(data=st.data(), extra=st.integers(1, 14))
    def start(self, data: st.DataObject, extra: int) -> None:
        sequence = self.pick(data, is_in_cache=False)
        if sequence is None:
            return
        hit = self.manager.match(sequence.blocks)
        self.check_hit(sequence, hit)
        num_hit_blocks = len(hit.tables[0])
        wanted = min(hit.num_tokens + extra, len(sequence.blocks.token_ids))
        num_free = self.manager.num_free_blocks
        has_started = self.manager.start(sequence.blocks, hit, wanted)
        needed = (-(-wanted // self.block_size) - num_hit_blocks) * len(self.windows) + hit.num_blocks_to_revive
        assert has_started == (needed <= num_free)
        if has_started:
            sequence.num_computed = hit.num_tokens
            self.handed_out([table[num_hit_blocks:] for table in sequence.blocks.tables])

    @rule(data=st.data(), extra=st.integers(1, 5))
    def grow(self, data: st.DataObject, extra: int) -> None:
        sequence = self.pick(data, is_in_cache=True)
        if sequence is None:
            return
        wanted = sequence.blocks.num_slots + extra
        reach = self.manager.reach(sequence.blocks)
        added = self.manager.grow(sequence.blocks, wanted)
        assert (added is not None) == (wanted <= reach)
        if added is not None:
            self.handed_out(added)

    @rule(data=st.data(), count=st.integers(1, 14))
    def compute(self, data: st.DataObject, count: int) -> None:
        sequence = self.pick(data, is_in_cache=True)
        if sequence is None:
            return
        token_ids = sequence.blocks.token_ids
        before = sequence.num_computed
        sequence.num_computed = min(before + count, sequence.blocks.num_slots, len(token_ids))
        known = set(self.contents.values())
        for index in range(before // self.block_size, sequence.num_computed // self.block_size):
            for group, table in enumerate(sequence.blocks.tables):
                content = self.content(sequence, group, index)
                if content not in known:
                    self.contents[table[index].block_id] = content
        self.manager.commit(sequence.blocks, sequence.num_computed)
        if sequence.num_computed == len(token_ids):
            token_ids.append(1)

    @rule(data=st.data(), is_for_good=st.booleans())
    def free(self, data: st.DataObject, is_for_good: bool) -> None:
        sequence = self.pick(data, is_in_cache=True)
        if sequence is None:
            return
        self.manager.free(sequence.blocks)
        sequence.num_computed = 0
        if is_for_good:
            self.sequences.remove(sequence)

    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        if not self.sequences:
            return
        sequence = data.draw(st.sampled_from(self.sequences))
        num_hashed = len(sequence.blocks.hashes)
        self.manager.distrust(sequence.blocks)
        doubted = {self.content(sequence, g, i) for g in range(len(self.windows)) for i in range(num_hashed)}
        self.contents = {block_id: held for block_id, held in self.contents.items() if held not in doubted}

    @rule()
    def reset(self) -> None:
        is_idle = not any(sequence.is_in_cache for sequence in self.sequences)
        assert self.manager.reset() == is_idle
        if is_idle:
            self.contents = {}

    @precondition(lambda self: hasattr(self, "manager"))
    @invariant()
    def books(self) -> None:
        live = [sequence for sequence in self.sequences if sequence.is_in_cache]
        self.manager.check([sequence.blocks for sequence in live])
        assert self.manager.num_cached_blocks == len(self.contents)
        held: set[int] = set()
        for sequence in live:
            for group, window in enumerate(self.windows):
                table = sequence.blocks.tables[group]
                held |= {block.block_id for block in table}
                start = 0 if window is None else max(0, sequence.num_computed - window + 1)
                for position in range(start, sequence.blocks.num_slots):
                    assert table[position // self.block_size].block_id, "a visible or coming token has no block"
        assert self.manager.num_free_blocks == self.manager.num_blocks - 1 - len(held - {0})


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=100, stateful_step_count=40)

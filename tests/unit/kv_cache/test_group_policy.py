"""What each kind of attention may take from the cache and may drop, against definitions by token position."""

from __future__ import annotations

import pytest

from octavo.kv_cache.block_pool import BlockPool
from octavo.kv_cache.group_policy import make_group_policy
from octavo.kv_spec import KVGroupSpec, KVKind

FULL = KVGroupSpec(KVKind.FULL, (0,), 1, 1, 4)


def window_spec(window: int) -> KVGroupSpec:
    return KVGroupSpec(KVKind.SLIDING_WINDOW, (0,), 1, 1, 4, window)


def pool_with(cached: set[int], length: int) -> tuple[BlockPool, list[bytes]]:
    """A pool that has the blocks of a chain at these indices."""
    pool = BlockPool(length + 2, 1)
    hashes = [b"%d" % index for index in range(length)]
    for index in sorted(cached):
        (block,) = pool.take(1)
        pool.make_findable(block, hashes[index], 0)
    return pool, hashes


def test_full_attention_hits_up_to_the_first_missing_block() -> None:
    pool, hashes = pool_with({0, 1, 3}, 5)
    hit = make_group_policy(FULL, 0, 4).longest_hit(hashes, pool)
    assert hit == [pool.find(b"0", 0), pool.find(b"1", 0)]


def _window_hit_by_definition(cached: set[int], length: int, block_size: int, window: int) -> int:
    """Longest hit in blocks: all positions that the next query sees must be in cached blocks."""
    for hit in range(length, 0, -1):
        query = hit * block_size
        seen = range(max(0, query - window + 1), query)
        if all(position // block_size in cached for position in seen):
            return hit
    return 0


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 8, 9, 13])
def test_a_window_hit_needs_exactly_the_blocks_that_the_next_query_sees(block_size: int, window: int) -> None:
    length = 6
    policy = make_group_policy(window_spec(window), 0, block_size)
    for bits in range(2**length):
        cached = {index for index in range(length) if bits >> index & 1}
        pool, hashes = pool_with(cached, length)
        hit = policy.longest_hit(hashes, pool)
        assert len(hit) == _window_hit_by_definition(cached, length, block_size, window), (cached, window)
        first_seen = max(0, len(hit) * block_size - window + 1)
        for index, block in enumerate(hit):
            is_seen = (index + 1) * block_size > first_seen
            assert (block is pool.find(hashes[index], 0)) if is_seen else (block is pool.null_block)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_a_block_is_dropped_as_soon_as_no_later_query_sees_it_and_no_earlier(block_size: int, window: int) -> None:
    policy = make_group_policy(window_spec(window), 0, block_size)
    pool = BlockPool(30, 1)
    table = pool.take(8)
    for num_computed in range(8 * block_size + 1):
        for index in policy.droppable(table, num_computed):
            assert table[index] is not pool.null_block
            table[index] = pool.null_block
        for index, block in enumerate(table):
            is_seen = (index + 1) * block_size > num_computed - window + 1
            assert (block is not pool.null_block) == is_seen, (num_computed, index)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_blocks_needed_is_what_a_sequence_holds_at_most(block_size: int, window: int) -> None:
    policy = make_group_policy(window_spec(window), 0, block_size)
    for num_tokens in range(1, 40):
        most = max(
            position // block_size - max(0, position - window + 1) // block_size + 1 for position in range(num_tokens)
        )
        # Blocks are dropped at block ends, so up to one more than the window touches may be held.
        assert most <= policy.num_blocks_for(num_tokens) <= min(most + 1, -(-num_tokens // block_size))
    assert make_group_policy(FULL, 0, block_size).num_blocks_for(7) == -(-7 // block_size)

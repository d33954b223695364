"""The pool's order of eviction and its own book check. Random sequences of calls: tests/property."""

from __future__ import annotations

import pytest

from octavo.kv_cache.block_pool import BlockPool


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 1)
    assert sorted(block.block_id for block in pool.take(4)) == [1, 2, 3, 4]
    assert pool.num_free_blocks == 0


def test_of_a_released_sequence_the_tail_is_evicted_first_and_older_sequences_before_newer() -> None:
    pool = BlockPool(5, 1)
    old, new = pool.take(2), pool.take(2)
    for index, block in enumerate(old + new):
        pool.make_findable(block, b"%d" % index, 0)
    pool.release(reversed(old))
    pool.release(reversed(new))
    assert [pool.take(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_blocks_that_nobody_can_find_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(3, 1)
    cached, private = pool.take(2)
    pool.make_findable(cached, b"h", 0)
    pool.release([cached])
    pool.release([private])
    assert pool.take(1) == [private]
    assert pool.find(b"h", 0) is cached


def test_a_free_cached_block_can_be_taken_back_from_the_middle_of_the_list() -> None:
    pool = BlockPool(4, 1)
    blocks = pool.take(3)
    for index, block in enumerate(blocks):
        pool.make_findable(block, b"%d" % index, 0)
    pool.release(blocks)
    pool.hold([blocks[1]])
    pool.check({blocks[1].block_id: 1})
    assert pool.take(2) == [blocks[0], blocks[2]]
    assert pool.find(b"1", 0) is blocks[1]
    assert pool.find(b"0", 0) is None, "handed out again, so its old content is gone"


def test_the_same_history_in_two_groups_is_two_entries() -> None:
    pool = BlockPool(3, 2)
    one, other = pool.take(2)
    pool.make_findable(one, b"h", 0)
    assert pool.find(b"h", 1) is None
    pool.make_findable(other, b"h", 1)
    assert (pool.find(b"h", 0), pool.find(b"h", 1)) == (one, other)
    assert pool.num_cached_blocks == 2


def test_the_first_block_of_a_hash_keeps_it() -> None:
    pool = BlockPool(3, 1)
    first, second = pool.take(2)
    pool.make_findable(first, b"h", 0)
    pool.make_findable(second, b"h", 0)
    pool.release([second])
    assert pool.take(1) == [second]
    assert pool.find(b"h", 0) is first
    pool.check({1: 1, 2: 1})


def test_forgetting_is_refused_while_a_block_is_held() -> None:
    pool = BlockPool(3, 1)
    (block,) = pool.take(1)
    pool.make_findable(block, b"h", 0)
    assert not pool.forget_all()
    assert pool.find(b"h", 0) is block
    pool.release([block])
    assert pool.forget_all()
    assert pool.find(b"h", 0) is None
    pool.check({})


def test_releasing_twice_fails_at_once() -> None:
    pool = BlockPool(3, 1)
    (block,) = pool.take(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([block])


def test_the_check_sees_leaks_and_broken_links() -> None:
    pool = BlockPool(4, 1)
    taken = pool.take(2)
    with pytest.raises(AssertionError, match="listed 0 times"):
        pool.check({taken[0].block_id: 1})
    pool.check({taken[0].block_id: 1, taken[1].block_id: 1})
    taken[0].ref_count = 2
    with pytest.raises(AssertionError, match="listed 1 times"):
        pool.check({taken[0].block_id: 1, taken[1].block_id: 1})
    taken[0].ref_count = 1
    pool.release(taken)
    taken[0].next = taken[0]
    with pytest.raises(AssertionError, match="broken"):
        pool.check({})

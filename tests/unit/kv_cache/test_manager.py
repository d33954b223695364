"""Match, start, grow, commit, free: what the scheduler relies on."""

from __future__ import annotations

import pytest

from octavo.kv_cache.manager import KVCacheManager, SequenceBlocks
from tests.simulation.configs import cache_config, kv_spec


def make_manager(num_blocks: int = 20, *windows: int | None, **changes: object) -> KVCacheManager:
    return KVCacheManager(cache_config(4, **changes), kv_spec(4, *windows), num_blocks)


def compute(manager: KVCacheManager, token_ids: list[int], **names: str | None) -> SequenceBlocks:
    """Bring a sequence in and compute all of it."""
    blocks = manager.open(token_ids, names.get("lora"), names.get("salt"))
    assert manager.start(blocks, manager.match(blocks), len(token_ids))
    manager.commit(blocks, len(token_ids))
    return blocks


def hit_tokens(manager: KVCacheManager, token_ids: list[int], **names: str | None) -> int:
    return manager.match(manager.open(token_ids, names.get("lora"), names.get("salt"))).num_tokens


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (40, 12)])
def test_a_hit_is_whole_blocks_and_leaves_the_last_token_to_compute(length: int, hit: int) -> None:
    manager = make_manager()
    compute(manager, list(range(12)))
    assert hit_tokens(manager, list(range(length))) == hit


def test_what_is_not_computed_yet_is_not_found() -> None:
    manager = make_manager()
    blocks = manager.open(list(range(12)), None, None)
    assert manager.start(blocks, manager.match(blocks), 12)
    assert hit_tokens(manager, list(range(12))) == 0
    manager.commit(blocks, 7)
    assert hit_tokens(manager, list(range(12))) == 4


def test_hits_are_shared_while_held_and_survive_their_first_owner() -> None:
    manager = make_manager(6)
    first = compute(manager, list(range(9)))
    second = compute(manager, list(range(9)))
    assert second.tables[0][:2] == first.tables[0][:2]
    assert second.tables[0][2] is not first.tables[0][2]
    assert manager.num_free_blocks == 1
    manager.check([first, second])
    manager.free(first)
    manager.check([second])
    assert hit_tokens(manager, list(range(9))) == 8


def test_salts_and_adapters_do_not_share() -> None:
    manager = make_manager()
    compute(manager, list(range(9)), salt="a")
    assert hit_tokens(manager, list(range(9)), salt="a") == 8
    assert hit_tokens(manager, list(range(9)), salt="b") == 0
    assert hit_tokens(manager, list(range(9))) == 0
    assert hit_tokens(manager, list(range(9)), lora="a") == 0
    assert hit_tokens(manager, list(range(9)), lora="x", salt="a") == 0


def test_without_prefix_caching_nothing_is_found_and_nothing_stays() -> None:
    manager = make_manager(20, enable_prefix_caching=False)
    blocks = compute(manager, list(range(12)))
    assert hit_tokens(manager, list(range(12))) == 0
    manager.free(blocks)
    assert manager.num_cached_blocks == 0
    manager.check([])


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    manager = make_manager(5)
    manager.free(compute(manager, list(range(16))))
    other = manager.open([99] * 4, None, None)
    assert manager.start(other, manager.match(other), 4)
    assert hit_tokens(manager, list(range(17))) == 12


def test_a_free_hit_counts_as_free_block_only_once() -> None:
    """A hit's own blocks are in the free list: they cannot also serve as new blocks."""
    manager = make_manager(4)
    manager.free(compute(manager, list(range(12))))
    blocks = manager.open(list(range(16)), None, None)
    hit = manager.match(blocks)
    assert (hit.num_tokens, hit.num_blocks_to_revive, manager.reach(hit)) == (12, 3, 12)
    assert not manager.start(blocks, hit, 16)
    manager.check([])
    assert manager.num_free_blocks == 3


def test_growing_is_all_or_nothing() -> None:
    manager = make_manager(4, None, 100)
    blocks = manager.open(list(range(4)), None, None)
    assert manager.start(blocks, manager.no_hit(), 4)
    assert manager.grow(blocks, 5) is None
    assert manager.num_free_blocks == 1
    manager.check([blocks])


def test_blocks_out_of_the_window_are_freed_while_running_and_still_found() -> None:
    manager = make_manager(20, 5)
    blocks = compute(manager, list(range(16)))
    assert blocks.block_ids()[0][:3] == [0, 0, 0]
    assert blocks.block_ids()[0][3] != 0
    assert manager.num_free_blocks == 18
    manager.check([blocks])
    assert hit_tokens(manager, list(range(9))) == 8, "dropped, but nobody has taken it since"


def test_groups_agree_on_a_hit_that_all_of_them_have() -> None:
    manager = make_manager(10, None, 5)
    manager.free(compute(manager, list(range(16))))  # 4 blocks in each group
    assert hit_tokens(manager, list(range(17))) == 16
    # Take the two free blocks that are not cached or the oldest: cached blocks are evicted from some group now.
    hog = manager.open([77] * 8, None, None)
    assert manager.start(hog, manager.match(hog), 8)
    hit = manager.match(manager.open(list(range(17)), None, None))
    assert len(hit.tables[0]) == len(hit.tables[1]) == hit.num_tokens // 4
    assert all(block.block_id for block in hit.tables[0])
    if hit.num_tokens:
        assert hit.tables[1][-1].block_id, "the window before the next token must be there"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    manager = make_manager()
    token_ids = list(range(10))
    blocks = compute(manager, token_ids)
    manager.free(blocks)
    token_ids += [10, 11, 12]
    hit = manager.match(blocks)
    assert hit.num_tokens == 8
    assert manager.start(blocks, hit, 13)
    manager.commit(blocks, 13)
    assert hit_tokens(manager, list(range(13))) == 12


def test_a_distrusted_history_is_not_found_again() -> None:
    manager = make_manager()
    compute(manager, [5] * 9)
    blocks = compute(manager, list(range(9)))
    manager.distrust(blocks)
    manager.free(blocks)
    assert hit_tokens(manager, list(range(9))) == 0
    assert hit_tokens(manager, [5] * 9) == 8


def test_reset_waits_until_nobody_runs() -> None:
    manager = make_manager()
    blocks = compute(manager, list(range(9)))
    assert not manager.reset()
    manager.free(blocks)
    assert manager.reset()
    assert hit_tokens(manager, list(range(9))) == 0


def test_the_check_sees_a_block_under_a_wrong_hash() -> None:
    manager = make_manager()
    blocks = compute(manager, list(range(9)))
    blocks.hashes[1] = b"other"
    with pytest.raises(AssertionError, match="another history"):
        manager.check([blocks])

"""The example of docs/extending/kv-group-policy.md against the definition of chunked attention. Red when the page's
code does not work any more, or the manager asks a policy for something that the page does not tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from octavo.kv_cache.group_policy import FullPolicy
from octavo.kv_cache.manager import KVCacheManager
from tests.simulation.configs import cache_config, kv_spec

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "kv-group-policy.md"
BLOCK_SIZE = 2
BLOCKS_PER_CHUNK = 3
CHUNK = BLOCK_SIZE * BLOCKS_PER_CHUNK


@pytest.fixture
def local_chunk_policy() -> Any:
    namespace: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(code, namespace)  # noqa: S102
    return namespace["LocalChunkPolicy"]


def test_running_keeps_what_the_next_token_sees_and_no_more(local_chunk_policy: Any) -> None:
    policy = local_chunk_policy(0, BLOCK_SIZE, BLOCKS_PER_CHUNK)
    manager = KVCacheManager(cache_config(BLOCK_SIZE), kv_spec(BLOCK_SIZE), 20, policies=[policy])
    tokens = list(range(20))
    blocks = manager.open(tokens, None, None)
    assert manager.start(blocks, manager.no_hit(), len(tokens))
    for num_computed in range(1, len(tokens) + 1):
        manager.commit(blocks, num_computed)
        first_seen = num_computed - num_computed % CHUNK
        held = [block_id != 0 for block_id in blocks.block_ids()[0]]
        assert held == [(index + 1) * BLOCK_SIZE > first_seen for index in range(len(held))]
        manager.check([blocks])
    assert policy.num_blocks_for(20) == BLOCKS_PER_CHUNK


@pytest.mark.parametrize("num_lost", range(10))
def test_a_hit_has_what_the_next_token_sees_in_both_groups(local_chunk_policy: Any, num_lost: int) -> None:
    """Beside a full group, with some blocks of both handed out again."""
    spec = kv_spec(BLOCK_SIZE, None, None)
    policies = [FullPolicy(spec.groups[0], 0, BLOCK_SIZE), local_chunk_policy(1, BLOCK_SIZE, BLOCKS_PER_CHUNK)]
    manager = KVCacheManager(cache_config(BLOCK_SIZE), spec, 1 + 18, policies=policies)
    tokens = list(range(18))
    first = manager.open(tokens, None, None)
    assert manager.start(first, manager.match(first), 18)
    manager.commit(first, 18)
    manager.free(first)
    other = manager.open([99] * 40, None, None)
    if num_lost:
        assert manager.start(other, manager.match(other), num_lost * BLOCK_SIZE)
    hit = manager.match(manager.open([*tokens, 18], None, None))
    assert hit.num_tokens == {0: 18, 9: 0}.get(num_lost, hit.num_tokens)
    full, local = hit.tables
    assert all(block.block_id for block in full)
    first_seen = hit.num_tokens - hit.num_tokens % CHUNK
    assert [block.block_id != 0 for block in local] == [
        (index + 1) * BLOCK_SIZE > first_seen for index in range(len(local))
    ]

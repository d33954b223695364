"""Chained block hashes. Red when two different histories, adapters or salts could share a hash, or equal ones not."""

from __future__ import annotations

import itertools

import pytest

from octavo.errors import ConfigError
from octavo.kv_cache.hashing import HASH_ALGORITHMS, BlockHasher


def chain(hasher: BlockHasher, token_ids: list[int], lora: str | None = None, salt: str | None = None) -> list[bytes]:
    hashes: list[bytes] = []
    hasher.extend(hashes, hasher.root(lora, salt), token_ids, len(token_ids))
    return hashes


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_only_full_blocks_are_hashed_and_growing_step_by_step_gives_the_same_chain(algorithm: str) -> None:
    hasher = BlockHasher(algorithm, 4, b"secret")
    tokens = list(range(100, 119))
    whole = chain(hasher, tokens)
    assert len(whole) == 4
    stepwise: list[bytes] = []
    for num_tokens in range(len(tokens) + 1):
        hasher.extend(stepwise, hasher.root(None, None), tokens, num_tokens)
        assert stepwise == whole[: num_tokens // 4]


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_a_block_hash_stands_for_the_whole_history(algorithm: str) -> None:
    hasher = BlockHasher(algorithm, 2, b"secret")
    one, other = chain(hasher, [1, 2, 3, 4, 5, 6]), chain(hasher, [9, 2, 3, 4, 5, 6])
    assert not set(one) & set(other)
    assert chain(hasher, [1, 2, 3, 4, 7, 6])[:2] == one[:2]


def test_adapters_and_salts_never_meet_even_when_their_texts_run_together() -> None:
    hasher = BlockHasher("sha256", 2, b"secret")
    names = [None, "", "a", "b", "ab", "ba", "a\0b"]
    roots = [hasher.root(lora, salt) for lora, salt in itertools.product(names, names)]
    assert len(set(roots)) == len(names) ** 2


def test_a_lone_surrogate_in_a_salt_is_no_crash() -> None:
    hasher = BlockHasher("sha256", 2, b"secret")
    assert hasher.root(None, "\ud800") != hasher.root(None, "\ud801")


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_every_start_has_a_secret_of_its_own(algorithm: str) -> None:
    assert chain(BlockHasher(algorithm, 2), [1, 2]) != chain(BlockHasher(algorithm, 2), [1, 2])


def test_token_ids_beyond_16_bits_are_told_apart() -> None:
    hasher = BlockHasher("sha256", 1, b"secret")
    assert chain(hasher, [1]) != chain(hasher, [1 + 65536])


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sha256, blake2b"):
        BlockHasher("md5", 16)

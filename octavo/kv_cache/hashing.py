"""Chained hashes: what makes two blocks of two requests the same block.

The hash of a block covers its tokens and the hash of the block before it, so it stands for the whole history. The
chain starts from a root that covers the LoRA adapter, the cache salt and a secret drawn at start-up, so histories
under different adapters or salts never meet, and nobody outside can prepare two prompts that collide. A digest has 256
bits: equal digests are taken as equal histories without comparing tokens.

Knows tokens and bytes only; who keeps hashes and who finds blocks by them: ``manager.py`` and ``block_pool.py``.
Paper: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024 (prefix reuse);
Kwon et al., SOSP 2023, section 4.4 (sharing of blocks).
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence

from octavo.errors import ConfigError

HASH_ALGORITHMS = ("sha256", "blake2b")
"""Values of ``CacheConfig.prefix_caching_hash_algo``. sha256 is quicker where the processor has instructions for it,
blake2b where it has not."""

_DIGEST_BYTES = 32
_TOKEN_BYTES = array("I").itemsize


class BlockHasher:
    """Hashes full blocks of one size, incrementally."""

    def __init__(self, algorithm: str, block_size: int, secret: bytes | None = None) -> None:
        """
        Args:
            algorithm: One of ``HASH_ALGORITHMS``.
            block_size: Tokens per block.
            secret: Start of every chain; drawn at random when None. Tests give one to be reproducible.

        Raises:
            ConfigError: The algorithm is unknown.
        """
        if algorithm not in HASH_ALGORITHMS:
            raise ConfigError(
                f"prefix_caching_hash_algo is {algorithm!r}, but must be one of {', '.join(HASH_ALGORITHMS)}",
                param="prefix_caching_hash_algo",
            )
        self._is_sha256 = algorithm == "sha256"
        self._secret = os.urandom(_DIGEST_BYTES) if secret is None else secret
        self._block_size = block_size

    def root(self, lora_name: str | None, cache_salt: str | None) -> bytes:
        """The parent of a first block. Every field is preceded by its length, so no two pairs run together."""
        parts = [self._secret]
        for text in (lora_name, cache_salt):
            data = b"" if text is None else text.encode("utf-8", "surrogatepass")
            parts.append((-1 if text is None else len(data)).to_bytes(8, "little", signed=True) + data)
        return self._digest(b"".join(parts))

    def extend(self, hashes: list[bytes], root: bytes, token_ids: Sequence[int], num_tokens: int) -> None:
        """Append the hashes of the full blocks of ``token_ids[:num_tokens]`` that ``hashes`` does not have yet.

        Args:
            hashes: Chain so far, one per full block; grows in place.
            root: From ``root()``; the parent of block 0.
            token_ids: The whole sequence; ids in [0, 2**32).
            num_tokens: Only this many tokens count.

        Cost: each token is hashed once over the life of a sequence.
        """
        start = len(hashes) * self._block_size
        end = num_tokens - num_tokens % self._block_size
        if start >= end:
            return
        data = array("I", token_ids[start:end]).tobytes()
        stride = self._block_size * _TOKEN_BYTES
        parent = hashes[-1] if hashes else root
        for offset in range(0, len(data), stride):
            parent = self._digest(parent + data[offset : offset + stride])
            hashes.append(parent)

    def _digest(self, data: bytes) -> bytes:
        if self._is_sha256:
            return hashlib.sha256(data).digest()
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=self._secret).digest()

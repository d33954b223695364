"""The sizes of multi-head latent attention, as plain data. Read from a config by ``checkpoint/mla.py``; no torch.

Paper: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Heads are made from a common latent vector of each token; part of a key carries the position."""

    query_rank: int | None
    """Size of the queries' latent vector; None = queries come straight from the hidden state."""
    kv_rank: int
    """Size of the keys' and values' latent vector."""
    plain_dim: int
    """Of a query or key head, without position."""
    rotary_dim: int
    """Of a query or key head, with position; one such part serves all key heads."""
    value_dim: int
    """Of a value head."""
    is_interleaved: bool = True
    """Checkpoints store the rotated pairs side by side; else all first halves before all second ones."""

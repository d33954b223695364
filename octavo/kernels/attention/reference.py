"""Paged attention in plain torch: what the kernels of this folder must compute."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention_ref(
    q_THD: Tensor, cache_NKGPD: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    *, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of every request over its paged history, in float32. Returns ``[T, H, D]`` float32.

    Args:
        q_THD: ``[T, H, D]``.
        cache_NKGPD: ``[N, 2, G, P, D]``, this step's keys and values written.
        block_table: ``[B, max_blocks]``.
        query_start_loc: ``[B + 1]``.
        seq_lens: ``[B]``.
        scale: Multiplies the products.
        window: Keys that a query sees, itself included.
        softcap: Bound of the scores.
        sinks: ``[H]``: a score of each head that takes part in the softmax and has no value.
    """
    num_heads, size = q_THD.shape[1:]
    kv_heads, page = cache_NKGPD.shape[2], cache_NKGPD.shape[3]
    out = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lens):
        first, last = starts[request], starts[request + 1]
        if first == last or length == 0:
            continue
        blocks = block_table[request, : -(-length // page)].long()
        kv = cache_NKGPD[blocks].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, size)[:, :, :length].float()
        k, v = kv.repeat_interleave(num_heads // kv_heads, dim=1)
        scores = torch.einsum("thd,hkd->htk", q_THD[first:last].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(length - (last - first), length, device=q_THD.device)[:, None]
        keys = torch.arange(length, device=q_THD.device)[None, :]
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, last - first, 1)), -1)
        weights = scores.softmax(-1)[..., :length]
        out[first:last] = torch.einsum("htk,hkd->thd", weights, v)
    return out

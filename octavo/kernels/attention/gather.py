"""Copy paged keys and values into contiguous tokens, for attention libraries that cannot read pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather(
    cache, block_table, pages, out, stride_block, stride_kv, stride_head, table_stride, out_stride_kv,
    G: tl.constexpr, PAGE_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    entry = pages + tl.program_id(0) * 4
    head = tl.program_id(1)
    kv = tl.program_id(2)
    request = tl.load(entry)
    column = tl.load(entry + 1)
    first = tl.load(entry + 2).to(tl.int64)
    count = tl.load(entry + 3)
    block = tl.load(block_table + request.to(tl.int64) * table_stride + column).to(tl.int64)
    rows = tl.arange(0, PAGE_PAD)
    columns = tl.arange(0, D_PAD)
    mask = (rows < count)[:, None] & (columns < D)[None, :]
    at = cache + block * stride_block + kv * stride_kv + head * stride_head
    values = tl.load(at + rows[:, None] * D + columns[None, :], mask=mask)
    to = out + kv * out_stride_kv + ((first + rows)[:, None] * G + head) * D + columns[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=mask)


def gather_pages(
    cache_NKGPD: Tensor, block_table: Tensor, pages: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Contiguous keys and values ``[2, num_tokens, G, D]`` of ``dtype``.

    Args:
        cache_NKGPD: ``[N, 2, G, P, D]``, contiguous.
        block_table: ``[B, max_blocks]`` int32.
        pages: ``[n, 4]`` int32: request, column of its table, first token of the result, tokens of the page to copy.
        num_tokens: Of the result.
        dtype: Of the result.

    Cost: one launch; reads and writes each key and value once. Reference: ``gather_pages_ref``.
    """
    kv_heads, page, size = cache_NKGPD.shape[2:]
    out = torch.empty((2, num_tokens, kv_heads, size), dtype=dtype, device=cache_NKGPD.device)
    _gather[(len(pages), kv_heads, 2)](
        cache_NKGPD, block_table, pages, out, *cache_NKGPD.stride()[:3], block_table.stride(0), out.stride(0), kv_heads,
        triton.next_power_of_2(page), size, triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out


def gather_pages_ref(
    cache_NKGPD: Tensor, block_table: Tensor, pages: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """As ``gather_pages``, page by page."""
    kv_heads, _, size = cache_NKGPD.shape[2:]
    out = torch.empty((2, num_tokens, kv_heads, size), dtype=dtype, device=cache_NKGPD.device)
    for request, column, first, count in pages.tolist():
        block = cache_NKGPD[int(block_table[request, column])]  # [2, G, P, D]
        out[:, first : first + count] = block[:, :, :count].transpose(1, 2).to(dtype)
    return out

"""Paged attention in Triton: cache writes, split-KV decode from a device work list, prefill.

Each file holds kernel, wrapper and reference. They import Triton, so only a backend that runs on a GPU (or in Triton's
interpreter) imports them. The cache of a layer is ``[N, 2, G, P, D]``: keys and values of one block and head are one
slab of ``P * D`` elements, which a single bulk copy (TMA) fetches.
"""

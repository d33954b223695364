"""Batched pieces of the sampler: draw, filters, penalties, masks, logprobs. Each file has the reference in plain torch.

They know tensors only: no requests, no parameters' defaults. ``sampling/sampler.py`` puts them in order.
"""

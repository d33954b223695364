"""Mixtures of experts as functions of tensors: choose experts (``routing``), sort tokens by expert (``align``),
multiply each with its expert's weights (``experts``), by the sizes in ``plans``. Each file has its reference; the
Triton kernels are ``kernels/gpu/moe.py`` and ``kernels/gpu/moe_gemm.py``.
"""

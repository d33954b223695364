"""Compiled CPU kernels behind tensors: what each function of the C files here computes, its shapes and its reference.

All work on float32 CPU tensors whose last dimension is contiguous; the caller checks nothing else. ``native_kernels()``
is None on a machine without a C compiler: callers then use the references, which are plain torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.kernels.native.build import load_library

SPAN_KEYS = 64
"""Keys of one task of single queries: ``SPAN`` in decode_attention.c."""
PREFILL_QUERIES = 96
"""Queries of one task of a prompt: ``QUERIES`` in prefill_attention.c."""
PANEL_COLUMNS = 16
"""Outputs whose weights lie side by side: ``COLUMNS`` in common.h."""
_ROWS_AT_ONCE = 1024

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "octavo_linear_float32": (_P, _L, _P, _P, _P, _L, _L, _L),
    "octavo_pack_float32": (_P, _P, _L, _L),
    "octavo_linear_int8": (_P, _L, _P, _P, _P, _P, _L, _L, _L, _P),
    "octavo_quantize_int8": (_P, _P, _P, _L, _L),
    "octavo_dequantize": (ctypes.c_int, _P, _P, _L),
    "octavo_rms_norm": (_P, _P, _P, _F, _P, _L, _L),
    "octavo_silu_and_mul": (_P, _P, _L, _L),
    "octavo_rotate": (_P, _L, _P, _L, _L, _L, _L),
    "octavo_decode_attention": (
        _P, _L, _P, _L, _P, _P, _L, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _F, _P, _P,
    ),
    "octavo_prefill_attention": (
        _P, _L, _P, _L, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _L, _F, _P, _P,
    ),
    "octavo_write_kv": (_P, _L, _P, _L, _P, _P, _L, _L),
}  # fmt: skip


class NativeKernels:
    """The functions of the library, over tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        self._prefill_scratch: Callable[[int, int, int], int] = library.octavo_prefill_scratch
        self._int8_scratch: Callable[[int, int], int] = library.octavo_linear_int8_scratch
        library.octavo_prefill_scratch.argtypes = (_L, _L, _L)
        library.octavo_linear_int8_scratch.argtypes = (_L, _L)
        library.octavo_prefill_scratch.restype = library.octavo_linear_int8_scratch.restype = _L
        self._linear_float32 = library.octavo_linear_float32
        self._pack_float32 = library.octavo_pack_float32
        self._linear_int8 = library.octavo_linear_int8
        self._quantize_int8 = library.octavo_quantize_int8
        self._dequantize = library.octavo_dequantize
        self._prefill_attention = library.octavo_prefill_attention
        self._rms_norm = library.octavo_rms_norm
        self._silu_and_mul = library.octavo_silu_and_mul
        self._rotate = library.octavo_rotate
        self._decode_attention = library.octavo_decode_attention
        self._write_kv = library.octavo_write_kv
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def pack_float32(self, weight: Tensor) -> Tensor:
        """``[N, K]`` to the zero-padded panels of ``linear_float32``: ``[ceil(N / 16), K, 16]``."""
        weight = weight.contiguous()
        panels = torch.empty((_panels(weight.shape[0]), weight.shape[1], PANEL_COLUMNS))
        self._pack_float32(weight.data_ptr(), panels.data_ptr(), *weight.shape)
        return panels

    def linear_float32(self, x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None) -> Tensor:
        """``x [T, K]`` times ``weight [N, K]^T + bias``: ``[T, N]``; ``panels`` is the packed weight.

        A row's result does not depend on the rows beside it. Reference: ``kernels.linear.linear_ref``.
        """
        rows, size = x.shape
        out = torch.empty((rows, num_outputs), dtype=torch.float32)
        self._linear_float32(
            x.data_ptr(), x.stride(0), panels.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            rows, size, num_outputs,
        )  # fmt: skip
        return out

    def quantize_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, K]`` of any float type, rounded as by ``quantization.int8.quantize_weight`` with 127, in the panels of
        ``linear_int8``, and its scales, zero-padded to whole panels: ``[ceil(N / 16), ceil(K / 2), 16, 2]`` int8,
        ``[ceil(N / 16) * 16]``."""
        rows, size = weight.shape
        panels = torch.empty((_panels(rows), -(-size // 2), PANEL_COLUMNS, 2), dtype=torch.int8)
        scales = torch.empty(_panels(rows) * PANEL_COLUMNS)
        # In pieces of whole panels: a float32 copy of a whole output head would be the peak of the process's memory.
        for first in range(0, rows, _ROWS_AT_ONCE):
            piece = weight[first : first + _ROWS_AT_ONCE].float().contiguous()
            self._quantize_int8(
                piece.data_ptr(), panels[first // PANEL_COLUMNS].data_ptr(), scales[first:].data_ptr(), *piece.shape
            )
        return panels, scales

    def linear_int8(self, x: Tensor, panels: Tensor, scales: Tensor, num_outputs: int, bias: Tensor | None) -> Tensor:
        """``x [T, K]`` times ``(weight [N, K] * scale [N])^T + bias``: ``[T, N]``; see ``quantize_int8``.

        Inputs are rounded to 16-bit integers with one scale per row (fewer bits when K is above 516, so that sums stay
        exact in 32 bits): the weights' rounding is all that is lost. A row's result does not depend on the rows beside
        it. Reference: ``quantization.int8.linear_int8_ref``.
        """
        rows, size = x.shape
        out = torch.empty((rows, num_outputs), dtype=torch.float32)
        scratch = self._borrow(self._int8_scratch(rows, size))
        self._linear_int8(
            x.data_ptr(), x.stride(0), panels.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(), rows, size, num_outputs, scratch,
        )  # fmt: skip
        return out

    def dequantize(self, blocks: Tensor, type_id: int, num_blocks: int, out: Tensor) -> None:
        """Blocks of a GGUF file, ``[bytes]`` uint8, to ``out``, ``[values]`` float32; see ``gguf.quants.dequantize``.

        Any number of threads may call it at once.
        """
        self._dequantize(type_id, blocks.data_ptr(), out.data_ptr(), num_blocks)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As ``kernels.norm.rms_norm_ref`` for contiguous ``[T, K]``."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), None, weight.data_ptr(), eps, out.data_ptr(), *x.shape)
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As ``kernels.norm.add_rms_norm_ref`` for contiguous ``[T, K]``."""
        out = torch.empty_like(residual)
        self._rms_norm(residual.data_ptr(), delta.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), *residual.shape)
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """As ``kernels.activation.silu_and_mul_ref`` for contiguous ``[T, 2F]``."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=torch.float32)
        self._silu_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, size)
        return out

    def rotate(self, x_THD: Tensor, rotation: Tensor) -> None:
        """As ``kernels.rope.rotate_ref``; the heads of a token must be contiguous."""
        tokens, heads, size = x_THD.shape
        self._rotate(x_THD.data_ptr(), x_THD.stride(0), rotation.data_ptr(), tokens, heads, size, 2 * rotation.shape[1])

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """Copy ``k``, ``v`` ``[T, G, D]`` to ``slot_mapping [T]`` int64 of ``cache [N, P, 2, G, D]``; -1 is skipped."""
        self._write_kv(
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), cache.data_ptr(), slot_mapping.data_ptr(),
            k.shape[0], k.shape[1] * k.shape[2],
        )  # fmt: skip

    def decode_attention(
        self, q: Tensor, cache: Tensor, plan: DecodePlan, scale: float, out: Tensor, sinks: Tensor | None = None
    ) -> None:
        """Each planned query ``q[i] [H, D]`` attends over its paged keys; writes ``out[i]``.

        Args:
            q: ``[T, H, D]``.
            cache: ``[N, P, 2, G, D]``.
            plan: Which rows of ``q``, over which keys.
            scale: Multiplies the products.
            out: ``[T, H, D]``; only planned rows are written.
            sinks: ``[H]``, contiguous: a score of each head that takes part in the softmax and has no value.
        """
        heads, size = q.shape[1], q.shape[2]
        scratch = self._borrow((plan.num_tasks * (size + 2) + torch.get_num_threads() * SPAN_KEYS) * heads * 4)
        self._decode_attention(
            q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), cache.data_ptr(), *plan.pointers, len(plan.lens),
            plan.num_tasks, heads, cache.shape[3], size, cache.shape[1], scale,
            None if sinks is None else sinks.data_ptr(), scratch,
        )  # fmt: skip

    def prefill_attention(
        self,
        q: Tensor,
        cache: Tensor,
        plan: PrefillPlan,
        scale: float,
        out: Tensor,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """The planned runs of queries attend causally over their paged keys, which the cache holds already.

        Args:
            q: ``[T, H, D]``; D is a multiple of 16.
            cache: ``[N, P, 2, G, D]``.
            plan: Which rows of ``q``, at which positions of which requests.
            scale: Multiplies the products.
            out: ``[T, H, D]``; only planned rows are written.
            window: Keys that a query sees, itself included; None for all.
            sinks: As in ``decode_attention``.
        """
        heads, size = q.shape[1], q.shape[2]
        groups = cache.shape[3]
        scratch = self._borrow(self._prefill_scratch(heads, groups, size))
        self._prefill_attention(
            q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), cache.data_ptr(), *plan.pointers,
            plan.num_tasks, heads, groups, size, cache.shape[1], window or 0, scale,
            None if sinks is None else sinks.data_ptr(), scratch,
        )  # fmt: skip

    def _borrow(self, num_bytes: int) -> int:
        """Address of working memory until the next call; calls of one engine never overlap."""
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes * 5 // 4 + 64, dtype=torch.uint8)
        return self._scratch.data_ptr()


class DecodePlan:
    """Work list of ``decode_attention``: made once per step, read by every layer."""

    def __init__(self, block_table: Tensor, query_index: list[int], starts: list[int], lens: list[int]) -> None:
        """Split each request's keys ``[start, len)`` into tasks.

        Args:
            block_table: ``[B, max_blocks]`` int32, rows contiguous.
            query_index: [B] row of ``q`` of each request.
            starts: [B] first visible position.
            lens: [B] one past the last.
        """
        tasks: list[int] = []
        firsts = [0]
        for request, (start, end) in enumerate(zip(starts, lens, strict=True)):
            for span in range(-(-(end - start) // SPAN_KEYS)):
                tasks += (request, span)
            firsts.append(len(tasks) // 2)
        self.num_tasks = len(tasks) // 2
        self.lens = lens
        lists = (query_index, starts, lens, tasks, firsts)
        packed = torch.tensor([value for values in lists for value in values], dtype=torch.int32)
        address = packed.data_ptr()
        addresses: list[int] = []
        for values in lists:
            addresses.append(address)
            address += 4 * len(values)
        self._alive = (packed, block_table)
        self.pointers = (block_table.data_ptr(), block_table.stride(0), *addresses)


class PrefillPlan:
    """Work list of ``prefill_attention``: made once per step, read by every layer."""

    def __init__(self, block_table: Tensor, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Cut runs of queries into tasks, those with the most keys first so that threads end together.

        Args:
            block_table: ``[B, max_blocks]`` int32, rows contiguous.
            spans: Of each run: its first row of ``q``, its number of rows, the position of the first, the request's
                row of ``block_table``.
        """
        tasks = [
            (position + start, index, start)
            for index, (_, count, position, _) in enumerate(spans)
            for start in range(0, count, PREFILL_QUERIES)
        ]
        tasks.sort(reverse=True)
        self.num_tasks = len(tasks)
        packed = torch.tensor(
            [value for span in spans for value in span] + [value for task in tasks for value in task[1:]],
            dtype=torch.int32,
        )
        self._alive = (packed, block_table)
        address = packed.data_ptr()
        self.pointers = (block_table.data_ptr(), block_table.stride(0), address, address + 16 * len(spans))


def _panels(num_outputs: int) -> int:
    return -(-num_outputs // PANEL_COLUMNS)


@functools.cache
def native_kernels() -> NativeKernels | None:
    """The compiled kernels, or None where they cannot be had."""
    library, _ = load_library()
    return None if library is None else NativeKernels(library)


def native_status() -> str:
    """Where the compiled library is, or why there is none."""
    return load_library()[1]

"""MXFP4 tensors of a checkpoint, decoded while they are loaded: blocks of 32 four-bit floats with one exponent each.

A tensor ``x`` is stored as ``x_blocks`` (two values a byte) and ``x_scales``; as soon as both have arrived it goes out
as ``x``, one slice of its first dimension after the other, on the device that the parameters are on. Memory beside the
weights: the packed bytes of one tensor. Every value is exact in bfloat16. Format: OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.loader.source import LoadRequest, RowSlice, WeightSource
from octavo.utils.text import format_bytes

logger = logging.getLogger(__name__)
BLOCKS, SCALES = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


@dataclass
class _Packed:
    """What has arrived of one tensor."""

    parts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, suffix: str, piece: Tensor | RowSlice) -> None:
        """Copy a piece: what sources yield may be gone when the other half comes."""
        tensor, start, count = (
            (piece.tensor, piece.row_start, piece.num_rows) if isinstance(piece, RowSlice) else (piece, 0, len(piece))
        )
        if suffix not in self.parts:
            self.parts[suffix] = torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype)
        self.parts[suffix][start : start + len(tensor)] = tensor
        self.rows[suffix] = self.rows.get(suffix, 0) + len(tensor)

    @property
    def is_complete(self) -> bool:
        """Whether all rows of both halves are here."""
        return len(self.parts) == 2 and all(self.rows[name] == len(part) for name, part in self.parts.items())


class Mxfp4Source:
    """Yields what another source yields, decoded.

    Args:
        source: Of the checkpoint as it is stored.
        request: As for every source.
    """

    def __init__(self, source: WeightSource, request: LoadRequest) -> None:
        self._source = source
        self._device = request.device
        self._origin = request.load_config.path or request.load_config.model

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource. The decoded tensors are ``[rows, columns, outputs]``: experts as gpt-oss holds them in
        memory, inputs before outputs."""
        waiting: dict[str, _Packed] = {}
        num_packed = num_values = 0
        logger.info(
            "MXFP4 weights are decoded while they are loaded: 4.25 bits a value in the files become 16 in float16 and "
            "bfloat16, 32 in float32"
        )

        def wanted_base(name: str) -> bool:
            suffix = _suffix(name)
            return wanted(name.removesuffix(suffix) if suffix else name)

        for name, piece in self._source.tensors(wanted_base):
            suffix = _suffix(name)
            if not suffix:
                yield name, piece
                continue
            base = name.removesuffix(suffix)
            packed = waiting.setdefault(base, _Packed())
            packed.add(suffix, piece)
            if packed.is_complete:
                del waiting[base]
                num_packed += sum(part.nbytes for part in packed.parts.values())
                num_values += 2 * packed.parts[BLOCKS].numel()
                yield from self._decoded(base, packed)
        if waiting:
            base, packed = next(iter(waiting.items()))
            lacking = next(suffix for suffix in (BLOCKS, SCALES) if suffix not in packed.parts)
            raise CheckpointError(self._origin, f"lacks {base}{lacking}, which belongs to it", tensor=base)
        logger.info(
            "decoded %s of MXFP4: %s in float16 and bfloat16, %s in float32",
            format_bytes(num_packed), format_bytes(2 * num_values), format_bytes(4 * num_values),
        )  # fmt: skip

    def _decoded(self, base: str, packed: _Packed) -> Iterator[tuple[str, RowSlice]]:
        blocks, scales = packed.parts[BLOCKS], packed.parts[SCALES]
        if (
            blocks.dtype is not torch.uint8
            or scales.dtype is not torch.uint8
            or blocks.dim() != 4
            or scales.shape != blocks.shape[:3]
            or blocks.shape[3] != 16
        ):
            raise CheckpointError(
                self._origin,
                f"has blocks {list(blocks.shape)} and scales {list(scales.shape)}, but MXFP4 is bytes [X, N, K/32, 16] "
                "and [X, N, K/32]",
                tensor=base,
            )
        for row in range(len(blocks)):
            values = decode_mxfp4(blocks[row].to(self._device), scales[row].to(self._device))
            yield base, RowSlice(values.t().unsqueeze(0), row, len(blocks))


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """``blocks [N, K / 32, 16]`` and ``scales [N, K / 32]``, bytes, to ``[N, K]`` bfloat16.

    The low half of a byte is the earlier value. Scales are exponents of two, biased by 127.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device=blocks.device)
    halves = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(table[halves.int()], scales.int().sub_(_BIAS)[..., None])
    return values.flatten(-2).bfloat16()


def _suffix(name: str) -> str:
    return next((suffix for suffix in (BLOCKS, SCALES) if name.endswith(suffix)), "")

"""Weights from a Hugging Face folder: one safetensors file or several with an index.

The header is read and checked here before a single value is touched; the bytes are views of a mapping whose pages are
given back as soon as a tensor has been copied, so that the resident size stays near the weights. Where a folder has
``.bin`` files too, those are left alone.
Format: https://github.com/huggingface/safetensors (8-byte length, JSON, raw bytes).
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint.files import drop_pages, parse_json_object, read_json_object, resolve_in_folder
from octavo.errors import CheckpointError
from octavo.loader.source import SLICE_BYTES, LoadRequest, RowSlice

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
MAX_RANK = 8
INDEX_NAME = "model.safetensors.index.json"
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_PART = re.compile(r"-of-(\d{1,6})\.safetensors$")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """From the start of the file, in bytes."""
    num_bytes: int


class SafetensorsSource:
    """Yields the tensors of a folder, or of one ``.safetensors`` file, in the order of their bytes."""

    def __init__(self, request: LoadRequest) -> None:
        self._path = Path(request.load_config.path)

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource. All headers are checked before the first tensor goes out."""
        headers = {file: read_header(file) for file in find_files(self._path)}
        owner: dict[str, Path] = {}
        for file, header in headers.items():
            for name in header:
                if name in owner:
                    raise CheckpointError(str(file), f"is also in {owner[name].name}", tensor=name)
                owner[name] = file
        for file, header in headers.items():
            chosen = {name: entry for name, entry in header.items() if wanted(name)}
            with MappedFile(file) as mapped:
                for name, entry in sorted(chosen.items(), key=lambda item: item[1].start):
                    for piece in _pieces(mapped, entry):
                        yield name, piece


def _pieces(mapped: MappedFile, entry: TensorEntry) -> Iterator[Tensor | RowSlice]:
    if entry.num_bytes <= SLICE_BYTES or len(entry.shape) < 2:
        yield mapped.view(entry.dtype, entry.shape, entry.start)
        mapped.drop(entry.start, entry.num_bytes)
        return
    row_bytes = entry.num_bytes // entry.shape[0]
    rows = max(1, SLICE_BYTES // row_bytes)
    for row in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - row)
        start = entry.start + row * row_bytes
        yield RowSlice(mapped.view(entry.dtype, (count, *entry.shape[1:]), start), row, entry.shape[0])
        mapped.drop(start, count * row_bytes)


class MappedFile:
    """A private mapping of a file, seen as tensors. Views must not be used after ``drop`` or after the end."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as f:
                # Private and writable: nothing is written, but torch warns of views of read-only memory.
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as exc:
            raise CheckpointError(str(path), f"cannot be mapped: {exc}") from exc

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
        """The values at byte ``start`` as a tensor, without a copy unless they are not aligned."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            raw = bytearray(self._map[start : start + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def drop(self, start: int, num_bytes: int) -> None:
        """Give the pages of a range back; reading them again would fetch them from the file once more."""
        drop_pages(self._map, start, num_bytes)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        # Views that someone still holds keep the mapping alive; it goes with the last of them.
        try:
            self._map.close()
        except BufferError:
            return


def find_files(path: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        CheckpointError: There is none, the index names one that is missing, or a part of several is missing.
    """
    if path.is_file():
        return [path]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if (path / INDEX_NAME).exists():
        return _from_index(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(str(path), "holds no .safetensors file; dummy weights need --load-format dummy")
    counts = {int(m.group(1)) for f in files if (m := _PART.search(f.name))}
    if len(counts) == 1 and (expected := counts.pop()) != len(files):
        raise CheckpointError(str(path), f"holds {len(files)} of {expected} parts: {files[0].name} and so on")
    return files


def _from_index(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), "has no weight_map object")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise CheckpointError(str(index), f"names {file!r:.200}, but must name a file of its folder", tensor=tensor)
        files.setdefault(file, []).append(tensor)
    for file, tensors in files.items():
        if not (folder / file).exists():
            raise CheckpointError(str(index), f"names the file {file}, which is not there", tensor=tensors[0])
        header = read_header(folder / file)
        for tensor in tensors:
            if tensor not in header:
                raise CheckpointError(
                    str(folder / file), f"is missing, but {INDEX_NAME} says it is here", tensor=tensor
                )
    return [folder / file for file in sorted(files)]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one file.

    Raises:
        CheckpointError: Anything in it is not as the format demands, or does not fit the size of the file.
    """
    target = resolve_in_folder(path)
    file = str(path)
    try:
        with target.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size < 8:
                raise CheckpointError(file, f"has only {size} bytes: no safetensors header")
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    file, f"claims a header of {length} bytes, but has {size} bytes and may have {MAX_HEADER_BYTES}"
                )
            raw = f.read(length)
    except OSError as exc:
        raise CheckpointError(file, f"cannot be read: {exc}") from exc
    try:
        header = parse_json_object(raw.decode("utf-8"), file)
    except UnicodeDecodeError as exc:
        raise CheckpointError(file, f"the header is not UTF-8: {exc}") from exc
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(file, "__metadata__ must map names to strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(file, f"holds {len(header)} tensors, more than {MAX_TENSORS}")
    data_start = 8 + length
    entries = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    _check_cover(file, entries, data_start, size)
    return entries


def _entry(file: str, name: str, value: Any, data_start: int) -> TensorEntry:
    def error(reason: str) -> CheckpointError:
        return CheckpointError(file, reason, tensor=name)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise error("must be described by dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise error(f"has the unknown dtype {kind!r:.60}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise error(f"has the shape {shape!r:.100}, but must have at most {MAX_RANK} non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise error(f"has the data_offsets {offsets!r:.100}, but must have two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise error(f"has the data_offsets {offsets}, which are negative or reversed")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise error(f"takes {end - begin} bytes, but {kind} {shape} needs {num_bytes}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, num_bytes)


def _check_cover(file: str, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors must lie one behind the other and fill the file: bytes shared or left over mean that something lies."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start + entry.num_bytes > size:
            raise CheckpointError(
                file,
                f"needs bytes {entry.start} to {entry.start + entry.num_bytes}, but the file ends at {size}: "
                "it is truncated or its header is wrong",
                tensor=name,
            )
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(file, f"{what}: it starts at byte {entry.start}, not {position}", tensor=name)
        position += entry.num_bytes
    if position != size:
        raise CheckpointError(file, f"has {size - position} bytes behind its last tensor")

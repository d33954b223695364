"""Reader for the header of a GGUF model: metadata and the index of tensors, every number checked against the file.

A model may lie in several files (``gguf_parts.py``): the first has the metadata, each has an index of its own tensors.

Knows the container only: not what the keys mean (``gguf_config.py``, ``gguf_tokenizer.py``) and not how to turn
blocks into floats (``octavo/loader/gguf.py``). Counts, lengths, dimensions and offsets are Python integers, so nothing
can overflow, and each is compared with what is left of the file before anything is allocated for it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from octavo.checkpoint.files import drop_pages
from octavo.checkpoint.gguf_parts import parts_of
from octavo.errors import CheckpointError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_ARRAY_DEPTH = 4
MAX_ELEMENTS = 4_000_000
"""Array elements in one header. The largest vocabularies have 262,144 entries in each of four arrays."""
MAX_HEADER_BYTES = 256 << 20
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1024

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_MIN_SIZE: dict[int, int] = {kind: s.size for kind, s in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}

QUANT_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Type id to (name, values per block, bytes per block): the types whose weights can be read."""
_LEFT_OUT = object()
"""In place of strings that nobody asked for."""
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor index."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as torch has it (the file stores the reverse)."""
    quant_type: str
    values_per_block: int
    bytes_per_block: int
    offset: int
    """From the start of its file, in bytes."""
    num_bytes: int
    part: int = 0
    """Which of the model's files it is in."""

    @property
    def num_rows(self) -> int:
        """Rows of the tensor seen as ``[rows, shape[-1]]``."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; blocks never cross rows."""
        return self.shape[-1] // self.values_per_block * self.bytes_per_block


class GGUFFile:
    """A mapped GGUF model whose headers have been read and checked. Use as a context manager.

    Args:
        path: The file, or any part of a model in several.
        strings: Lists of strings (vocabularies) that ``metadata`` shall hold; None for all. They are most of the work.

    Raises:
        CheckpointError: A header is damaged, lies about its file, or holds a tensor type that cannot be read; a part
            is missing or belongs to another model.
    """

    def __init__(self, path: str | os.PathLike[str], *, strings: Container[str] | None = None) -> None:
        self.path = Path(path)
        self._maps: list[mmap.mmap] = []
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        paths = parts_of(self.path)
        try:
            for number, part in enumerate(paths):
                mapped = _map_file(part)
                self._maps.append(mapped)
                header = _Header(mapped, str(part), number, strings)
                header.read()
                _check_part(header, number, len(paths))
                if number == 0:
                    self.metadata = header.metadata
                for name, tensor in header.tensors.items():
                    if self.tensors.setdefault(name, tensor) is not tensor:
                        raise CheckpointError(str(part), "is in an earlier part too", tensor=name)
            total = self.metadata.get("split.tensors.count")
            if len(paths) > 1 and total is not None and total != len(self.tensors):
                reason = f"speaks of {total} tensors (split.tensors.count), but the parts hold {len(self.tensors)}"
                raise CheckpointError(str(paths[0]), reason)
        except BaseException:
            self.close()
            raise

    def view(self, tensor: GGUFTensor, row_start: int = 0, row_end: int | None = None) -> memoryview:
        """The raw blocks of rows ``row_start`` to ``row_end`` (all to the end when None), as they lie in the file.

        Not to be written to; to be dropped before the file is closed.
        """
        end = tensor.num_rows if row_end is None else row_end
        assert 0 <= row_start <= end <= tensor.num_rows
        whole = memoryview(self._maps[tensor.part])
        return whole[tensor.offset + row_start * tensor.row_bytes : tensor.offset + end * tensor.row_bytes]

    def drop(self, tensor: GGUFTensor, row_start: int, row_end: int) -> None:
        """Take the pages of these rows out of the resident set, where the system can."""
        start = tensor.offset + row_start * tensor.row_bytes
        drop_pages(self._maps[tensor.part], start, (row_end - row_start) * tensor.row_bytes)

    def close(self) -> None:
        """Unmap the files. Where somebody still holds a view, its file goes with the last of them."""
        for mapped in self._maps:
            with suppress(BufferError):
                mapped.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as f:
            num_bytes = os.fstat(f.fileno()).st_size
            if num_bytes < 24:
                raise CheckpointError(str(path), f"has only {num_bytes} bytes: no GGUF header")
            # A private mapping: nothing is ever written, but torch refuses views of read-only memory.
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as exc:
        raise CheckpointError(str(path), f"cannot be opened: {exc}") from exc


def _check_part(header: _Header, number: int, count: int) -> None:
    """What a header says of its place among the parts must be what the names of the files say."""
    stated = header.metadata.get("split.count", 1) or 1
    if stated != count:
        named = f"its name says {count}" if count > 1 else "its name does not say so, and the others cannot be found"
        raise header.error(
            f"is one of {stated!r:.20} parts (split.count), but {named}: parts are called NAME-00001-of-00003.gguf"
        )
    stated_number = header.metadata.get("split.no", number)
    if count > 1 and stated_number != number:
        raise header.error(f"is part {stated_number} counted from 0 (split.no), but is named as part {number}")


class _Header:
    """One pass over the header."""

    def __init__(self, data: mmap.mmap, file: str, part: int, wanted: Container[str] | None) -> None:
        self.data = data
        self.file = file
        self.part = part
        self.wanted = wanted
        self.key = ""
        self.end = len(data)
        self.limit = min(self.end, MAX_HEADER_BYTES)
        self.position = 0
        self.num_elements = 0
        self.what = "header"
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}

    def error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.file, reason, tensor=tensor)

    def need(self, num_bytes: int) -> int:
        """Claim the next ``num_bytes`` and return where they start."""
        start = self.position
        if num_bytes > self.limit - start:
            if num_bytes > self.end - start:
                reason = f"only {self.end - start} bytes are left of the file"
            else:
                reason = f"headers may have at most {MAX_HEADER_BYTES} bytes"
            raise self.error(f"{self.what} at byte {start} needs {num_bytes} bytes, but {reason}")
        self.position = start + num_bytes
        return start

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self.data, self.need(layout.size))[0]

    def u32(self) -> int:
        return self.number(_SCALARS[4])

    def u64(self) -> int:
        return self.number(_SCALARS[10])

    def string(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64()
        if length > max_bytes:
            raise self.error(f"{self.what} is a string of {length} bytes, more than the {max_bytes} allowed")
        start = self.need(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.error(f"{self.what} is not UTF-8: {exc}") from exc

    def read(self) -> None:
        if self.data[:4] != MAGIC:
            raise self.error(f"starts with {bytes(self.data[:4])!r}, not with {MAGIC!r}: not a GGUF file")
        self.position = 4
        version = self.u32()
        if version not in (2, 3):
            big = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
            raise self.error(f"has GGUF version {version}{big}, but only versions 2 and 3, little endian, can be read")
        num_tensors, num_keys = self.u64(), self.u64()
        left = self.limit - self.position
        if num_keys * 13 > left:
            raise self.error(f"claims {num_keys} metadata keys, which cannot fit the {self.end} bytes of the file")
        if num_tensors > MAX_TENSORS or num_tensors * 32 > left:
            raise self.error(f"claims {num_tensors} tensors, which cannot fit the {self.end} bytes of the file")
        for index in range(num_keys):
            self.what = f"name of metadata key {index}"
            key = self.string(MAX_NAME_BYTES)
            if key in self.metadata:
                raise self.error(f"holds the metadata key {key!r} twice")
            self.key = key
            self.what = f"metadata key {key!r}"
            value = self.value(self.u32(), 0)
            if value is not _LEFT_OUT:
                self.metadata[key] = value
        self.index(num_tensors)

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        layout = _SCALARS.get(kind)
        if layout is None:
            raise self.error(f"{self.what} has the unknown value type {kind}")
        value = self.number(layout)
        if kind == _BOOL:
            return self.boolean(value)
        return _shortest(value) if kind == 6 else value

    def boolean(self, value: int) -> bool:
        if value > 1:
            raise self.error(f"{self.what} is a boolean of value {value}")
        return bool(value)

    def array(self, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"{self.what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, count = self.u32(), self.u64()
        size = _MIN_SIZE.get(kind)
        if size is None:
            raise self.error(f"{self.what} is an array of the unknown value type {kind}")
        if count * size > self.limit - self.position:
            raise self.error(f"{self.what} claims {count} elements, but only {self.end - self.position} bytes are left")
        self.num_elements += count
        if self.num_elements > MAX_ELEMENTS:
            raise self.error(f"{self.what}: arrays with more than {MAX_ELEMENTS} elements together are refused")
        if kind == _STRING:
            is_wanted = self.wanted is None or self.key in self.wanted
            return self.strings(count) if is_wanted else self.skip_strings(count)
        if kind == _ARRAY:
            return [self.array(depth + 1) for _ in range(count)]
        start = self.need(count * size)
        numbers = list(struct.unpack_from(f"<{count}{_SCALARS[kind].format[1:]}", self.data, start))
        if kind == _BOOL:
            return [self.boolean(n) for n in numbers]
        return numbers

    def strings(self, count: int) -> list[str]:
        """``string()`` ``count`` times, with everything in local names: vocabularies have 10^5 entries."""
        data, position, limit = self.data, self.position, self.limit
        length_at: Callable[[Any, int], tuple[int]] = _SCALARS[10].unpack_from
        result: list[str] = []
        try:
            for _ in range(count):
                if limit - position < 8:
                    raise self.error(f"{self.what} ends in the middle of string {len(result)}")
                (length,) = length_at(data, position)
                position += 8
                if length > limit - position:
                    raise self.error(
                        f"{self.what}: string {len(result)} claims {length} bytes, but {limit - position} are left"
                    )
                result.append(data[position : position + length].decode("utf-8"))
                position += length
        except UnicodeDecodeError as exc:
            raise self.error(f"{self.what}: string {len(result)} is not UTF-8: {exc}") from exc
        self.position = position
        return result

    def skip_strings(self, count: int) -> object:
        """As ``strings``, for those that nobody asks for: a quarter of the time."""
        data, position, limit = self.data, self.position, self.limit
        length_at: Callable[[Any, int], tuple[int]] = _SCALARS[10].unpack_from
        for index in range(count):
            if limit - position < 8:
                raise self.error(f"{self.what} ends in the middle of string {index}")
            position += 8 + length_at(data, position)[0]
        if position > limit:
            raise self.error(f"{self.what}: string {count - 1} claims more bytes than are left")
        self.position = position
        return _LEFT_OUT

    def index(self, num_tensors: int) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(
                f"general.alignment is {alignment!r}, but must be a power of two between 8 and {MAX_ALIGNMENT}"
            )
        entries: list[tuple[str, tuple[int, ...], int, int]] = []
        for i in range(num_tensors):
            self.what = f"entry of tensor {i}"
            name = self.string(MAX_NAME_BYTES)
            self.what = f"entry of tensor {name!r}"
            num_dims = self.u32()
            if not 1 <= num_dims <= 4:
                raise self.error(f"has {num_dims} dimensions, but must have 1 to 4", name)
            dims = tuple(self.u64() for _ in range(num_dims))
            entries.append((name, dims[::-1], self.u32(), self.u64()))
        data_start = -(-self.position // alignment) * alignment
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise self.error("occurs twice in the index", name)
            if offset % alignment:
                raise self.error(f"starts at offset {offset}, which is not a multiple of {alignment}", name)
            self.tensors[name] = self.entry(name, shape, kind, data_start + offset)
        ordered = sorted(self.tensors.values(), key=lambda t: t.offset)
        for before, after in zip(ordered, ordered[1:], strict=False):
            if before.offset + before.num_bytes > after.offset:
                raise self.error(f"overlaps the bytes of tensor {before.name!r}", after.name)

    def entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in QUANT_TYPES:
            readable = ", ".join(sorted(n for n, _, _ in QUANT_TYPES.values()))
            known = _OTHER_TYPES.get(kind)
            said = f"has the type {known}" if known else f"has the unknown type id {kind}"
            raise self.error(f"{said}, which cannot be read; readable are {readable}", name)
        quant_type, values, size = QUANT_TYPES[kind]
        if min(shape) < 1:
            raise self.error(f"has the shape {list(shape)}, but every dimension must be at least 1", name)
        if shape[-1] % values:
            raise self.error(f"has rows of {shape[-1]} values, but {quant_type} packs {values} at a time", name)
        num_bytes = math.prod(shape) // values * size
        if offset + num_bytes > self.end:
            raise self.error(
                f"needs bytes {offset} to {offset + num_bytes}, but the file ends at {self.end}: "
                "it is truncated or its header is wrong",
                name,
            )
        return GGUFTensor(name, shape, quant_type, values, size, offset, num_bytes, self.part)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: what was written as 1e-05 is read as 1e-05."""
    if not math.isfinite(value):
        return value
    packed = struct.pack("<f", value)
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == packed:
                return short
        except OverflowError:
            continue
    return value

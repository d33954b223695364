"""GGUF headers, true and false. Red when a count, length or offset of a file is believed without a look at the file."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.gguf_file import MAX_ELEMENTS, GGUFFile
from octavo.checkpoint.locate import LocatedModel
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.errors import CheckpointError
from tests.unit.loader.builders import TOKENS, write_gguf

U32, U64, STRING, ARRAY = "<I", "<Q", 8, 9
HUGE = 2**64 - 1


def s(text: bytes) -> bytes:
    return struct.pack(U64, len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return s(name) + struct.pack(U32, kind) + value


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    packed = b"".join(struct.pack(U64, d) for d in dims)
    return s(name) + struct.pack(U32, len(dims)) + packed + struct.pack(U32, kind) + struct.pack(U64, offset)


def file(
    keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 4096, *, magic: bytes = b"GGUF",
    version: int = 3, num_keys: int | None = None, num_tensors: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = magic + struct.pack(U32, version) + struct.pack("<QQ", *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def nested(depth: int) -> bytes:
    value = struct.pack("<IQ", 4, 0)
    for _ in range(depth):
        value = struct.pack("<IQ", ARRAY, 1) + value
    return value


MUTATIONS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF header"),
    "magic only": (b"GGUF", "no GGUF header"),
    "wrong magic": (file(magic=b"GGML"), "not a GGUF file"),
    "zip": (file(magic=b"PK\3\4"), "not a GGUF file"),
    "version 0": (file(version=0), "version 0"),
    "version 1": (file(version=1), "version 1"),
    "version 99": (file(version=99), "version 99"),
    "big endian": (file(version=3 << 24), "big-endian"),
    "tensor count 2^64-1": (file(num_tensors=HUGE), "claims 18446744073709551615 tensors"),
    "tensor count one too many": (file(tensors=(tensor(),), num_tensors=2, data=0), "claims 2 tensors"),
    "key count 2^64-1": (file(num_keys=HUGE), "claims 18446744073709551615 metadata keys"),
    "key count 2^40": (file(num_keys=2**40), "metadata keys"),
    "key count one too many": (file(num_keys=1, data=0), "metadata keys"),
    "key name 2^63": (file((struct.pack(U64, 2**63) + b"x" * 64,)), "string of 9223372036854775808 bytes"),
    "key name past the end": (file((struct.pack(U64, 1000) + b"x" * 64,), data=0), "left of the file"),
    "key not UTF-8": (file((key(b"\xff\xfe", 4, bytes(4)),)), "not UTF-8"),
    "string value 2^63": (file((key(b"k", STRING, struct.pack(U64, 2**63)),)), "'k' is a string of"),
    "string value 2^28": (file((key(b"k", STRING, struct.pack(U64, 2**28)),)), "left of the file"),
    "string value not UTF-8": (file((key(b"k", STRING, s(b"\xc3\x28")),)), "not UTF-8"),
    "value type 13": (file((key(b"k", 13, bytes(8)),)), "unknown value type 13"),
    "value type 2^32-1": (file((key(b"k", 2**32 - 1, bytes(8)),)), "unknown value type"),
    "boolean 2": (file((key(b"k", 7, b"\2"),)), "boolean of value 2"),
    "key twice": (file((key(b"k", 4, bytes(4)),) * 2), "'k' twice"),
    "array of type 99": (file((key(b"k", ARRAY, struct.pack("<IQ", 99, 1)),)), "unknown value type 99"),
    "array count 2^64-1": (file((key(b"k", ARRAY, struct.pack("<IQ", 4, HUGE)),)), "claims 18446744073709551615"),
    "array count 2^62 of u64": (file((key(b"k", ARRAY, struct.pack("<IQ", 10, 2**62)),)), "claims 4611686018427387904"),
    "string array count": (file((key(b"k", ARRAY, struct.pack("<IQ", STRING, 2**32)),)), "claims 4294967296"),
    "string in array 2^63": (
        file((key(b"k", ARRAY, struct.pack("<IQQ", STRING, 2, 2**63)),)), "string 0 claims 9223372036854775808",
    ),
    "string in array cut": (file((key(b"k", ARRAY, struct.pack("<IQQ", STRING, 1, 90)),), data=8), "string 0 claims"),
    "string in array not UTF-8": (
        file((key(b"k", ARRAY, struct.pack("<IQ", STRING, 1) + s(b"\xff")),)), "string 0 is not UTF-8",
    ),
    "arrays 5 deep": (file((key(b"k", ARRAY, nested(5)),)), "nests arrays"),
    "arrays 1000 deep": (file((key(b"k", ARRAY, nested(1000)),)), "nests arrays"),
    "too many elements": (
        file((key(b"k", ARRAY, struct.pack("<IQ", 0, MAX_ELEMENTS + 1)),), data=MAX_ELEMENTS + 64), "refused",
    ),
    "alignment 0": (file((key(b"general.alignment", 4, struct.pack(U32, 0)),)), "general.alignment is 0"),
    "alignment 3": (file((key(b"general.alignment", 4, struct.pack(U32, 3)),)), "general.alignment is 3"),
    "alignment 2^31": (file((key(b"general.alignment", 4, struct.pack(U32, 2**31)),)), "general.alignment"),
    "alignment text": (file((key(b"general.alignment", STRING, s(b"32")),)), "general.alignment is '32'"),
    "no dimensions": (file(tensors=(tensor(dims=()),)), "has 0 dimensions"),
    "5 dimensions": (file(tensors=(tensor(dims=(1,) * 5),)), "has 5 dimensions"),
    "2^31 dimensions": (
        file(tensors=(s(b"t") + struct.pack(U32, 2**31) + bytes(32),)), "has 2147483648 dimensions",
    ),
    "dimension 0": (file(tensors=(tensor(dims=(8, 0)),)), "every dimension must be at least 1"),
    "product overflows 2^64": (file(tensors=(tensor(dims=(2**33, 2**33)),)), "the file ends at"),
    "product wraps to 8": (file(tensors=(tensor(dims=(2**63, 2, 8)),)), "the file ends at"),
    "type 4": (file(tensors=(tensor(kind=4),)), "unknown type id 4"),
    "type 2^32-1": (file(tensors=(tensor(kind=2**32 - 1),)), "unknown type id"),
    "type Q8_1": (file(tensors=(tensor(dims=(256,), kind=9),)), "Q8_1, which cannot be read"),
    "half a block": (file(tensors=(tensor(dims=(48,), kind=2),)), "Q4_0 packs 32"),
    "offset not aligned": (file(tensors=(tensor(offset=8),)), "not a multiple of 32"),
    "offset past the end": (file(tensors=(tensor(offset=1 << 20),)), "the file ends at"),
    "offset 2^64-32": (file(tensors=(tensor(offset=2**64 - 32),)), "the file ends at"),
    "last byte missing": (file(tensors=(tensor(dims=(1024,)),), data=4095), "truncated"),
    "tensors overlap": (file(tensors=(tensor(b"a", (16,)), tensor(b"b", (16,), offset=32))), "overlaps"),
    "tensor twice": (file(tensors=(tensor(), tensor(offset=64))), "occurs twice"),
    "tensor name 2^40": (file(tensors=(struct.pack(U64, 2**40) + bytes(64),)), "entry of tensor 0"),
}  # fmt: skip


@contextmanager
def little_memory(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit_bytes


@pytest.mark.parametrize("name", MUTATIONS)
def test_false_header_is_refused_with_file_and_reason(name: str, tmp_path: Path) -> None:
    raw, reason = MUTATIONS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with little_memory(16 << 20), pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert reason in caught.value.message
    assert caught.value.file == str(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            GGUFFile(path)


def read_all(path: Path) -> None:
    read_model_config(LocatedModel("m", str(path), "gguf"))
    load_tokenizer_data(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A file cut anywhere lacks at least its last tensor."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    raw = whole.read_bytes()
    with GGUFFile(whole) as good:
        header_bytes = min(t.offset for t in good.tensors.values())
    path = tmp_path / "cut.gguf"
    for end in [*range(0, header_bytes, 61), *range(header_bytes, len(raw), len(raw) // 40), len(raw) - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(CheckpointError):
            GGUFFile(path)


def test_flipped_header_bytes_never_crash(tmp_path: Path) -> None:
    """Damage is refused, or harmless; nothing else may come out, and no large allocation on the way."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    raw = bytearray(path.read_bytes())
    with GGUFFile(path) as good:
        header_bytes = min(t.offset for t in good.tensors.values())
    rng = random.Random(1)
    refused = 0
    with little_memory(32 << 20):
        for _ in range(300):
            damaged = bytearray(raw)
            for _ in range(rng.choice((1, 1, 1, 4))):
                damaged[rng.randrange(header_bytes)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            path.write_bytes(damaged)
            try:
                read_all(path)
            except CheckpointError as exc:
                assert str(path) in exc.message
                refused += 1
    assert refused > 50


def test_reads_the_same_as_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quant="Q5_0", metadata={"a.flag": True, "a.list": [1.5, -2.0], "a.negative": [-1, 3]})
    reference = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        for name, field in reference.fields.items():
            if not name.startswith("GGUF."):
                value = field.contents()
                assert ours.metadata[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
        assert list(ours.tensors) == [t.name for t in reference.tensors]
        for expected in reference.tensors:
            entry = ours.tensors[expected.name]
            assert entry.shape == tuple(reversed(expected.shape.tolist()))
            assert (entry.quant_type, entry.offset, entry.num_bytes) == (
                expected.tensor_type.name, int(expected.data_offset), int(expected.n_bytes),
            )  # fmt: skip
            assert ours.view(entry) == expected.data.tobytes()


def test_float_metadata_is_the_decimal_that_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata={"x.eps": 1e-5, "x.base": 1000000.0, "x.third": 1 / 3})
    with GGUFFile(path) as ours:
        assert ours.metadata["x.eps"] == 1e-5
        assert ours.metadata["x.base"] == 1000000.0
        assert ours.metadata["x.third"] == pytest.approx(1 / 3, rel=1e-7)


def test_vocabulary_of_real_size_is_read(tmp_path: Path) -> None:
    """A hundred thousand strings go through the array reader; the first and the last are right."""
    path = tmp_path / "m.gguf"
    tokens = TOKENS + [f"word{i}" for i in range(100_000)]
    write_gguf(path, metadata={"tokenizer.ggml.tokens": tokens})
    with GGUFFile(path) as ours:
        assert ours.metadata["tokenizer.ggml.tokens"] == tokens

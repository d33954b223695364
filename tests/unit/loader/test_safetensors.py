"""Safetensors folders, true and false. Red when values differ from the reference library's, or a header is believed."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import CheckpointError
from octavo.loader.safetensors import MAX_TENSORS, SafetensorsSource, read_header
from octavo.loader.source import SLICE_BYTES, RowSlice
from tests.unit.loader.builders import collect, hf_weights, request, safetensors_bytes, write_sharded


def load(path: Path) -> dict[str, torch.Tensor]:
    return collect(SafetensorsSource(request(path)))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_single_file(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = hf_weights(dtype=dtype)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(tmp_path), weights)
    assert_same(load(tmp_path / "model.safetensors"), weights)


def test_shards_with_and_without_index(tmp_path: Path) -> None:
    weights = hf_weights()
    write_sharded(tmp_path, weights)
    assert_same(load(tmp_path), weights)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(load(tmp_path), weights)


def test_only_wanted_tensors_come_and_all_are_asked_for(tmp_path: Path) -> None:
    weights = hf_weights()
    save_file(weights, tmp_path / "model.safetensors")
    asked: list[str] = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return name == "model.norm.weight"

    assert [name for name, _ in SafetensorsSource(request(tmp_path)).tensors(wanted)] == ["model.norm.weight"]
    assert sorted(asked) == sorted(weights)


def test_large_tensor_comes_in_slices(tmp_path: Path) -> None:
    big = torch.arange(3 * SLICE_BYTES // 4 + 700, dtype=torch.float32)[: 3 * SLICE_BYTES // 4 // 7 * 7].view(-1, 7)
    save_file({"big": big, "small": torch.ones(3)}, tmp_path / "model.safetensors")
    pieces = [p for name, p in SafetensorsSource(request(tmp_path)).tensors(lambda _: True) if name == "big"]
    assert len(pieces) > 2
    assert all(isinstance(p, RowSlice) and p.tensor.nbytes <= SLICE_BYTES for p in pieces)
    assert torch.equal(load(tmp_path)["big"], big)


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    """The format does not promise alignment: a header of odd length moves all data to odd addresses."""
    data = torch.randn(5)
    header = b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, data.numpy().tobytes()))
    assert torch.equal(load(tmp_path)["a"], data)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    weights = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), weights)


# --- false headers ---

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]}
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
D = bytes(range(32))


def one(**changes: Any) -> bytes:
    return safetensors_bytes({"a": A | changes}, D[:16])


MUTATIONS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors header"),
    "seven bytes": (b"\0" * 7, "no safetensors header"),
    "header length 0": (safetensors_bytes(b"", D, length=0), "claims a header of 0 bytes"),
    "header length 1": (safetensors_bytes(b"{", D, length=1), "claims a header of 1 bytes"),
    "header length 2^63": (safetensors_bytes({"a": A}, D[:16], length=2**63), "claims a header of 9223372036854775808"),
    "header length 2^64-1": (safetensors_bytes({"a": A}, D[:16], length=2**64 - 1), "claims a header of"),
    "header longer than file": (safetensors_bytes({"a": A}, D[:16], length=4000), "claims a header of 4000 bytes"),
    "header cut short": (safetensors_bytes({"a": A}, D[:16], length=20), "not valid JSON"),
    "header too long by one": (
        safetensors_bytes({"a": A}, D[:16], length=len(json.dumps({"a": A})) + 1), "not valid JSON",
    ),
    "not JSON": (safetensors_bytes(b"not json at all"), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "a list": (safetensors_bytes([A]), "JSON object, not list"),
    "null": (safetensors_bytes(b"null"), "JSON object, not NoneType"),
    "nested 100000 deep": (safetensors_bytes(b"[" * 100_000), "not valid JSON"),
    "duplicate names": (
        safetensors_bytes(b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(B).encode()), D), "'a' twice",
    ),
    "duplicate fields": (
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', D[:16]), "twice",
    ),
    "entry is a number": (safetensors_bytes({"a": 3}), "must be described by"),
    "entry without dtype": (safetensors_bytes({"a": {"shape": [], "data_offsets": [0, 0]}}), "must be described by"),
    "entry with one more field": (one(strides=[1]), "must be described by"),
    "unknown dtype": (one(dtype="F33"), "unknown dtype 'F33'"),
    "dtype is a list": (one(dtype=["F32"]), "unknown dtype"),
    "dtype is null": (one(dtype=None), "unknown dtype None"),
    "wider dtype": (one(dtype="F64"), "takes 16 bytes, but F64 [2, 2] needs 32"),
    "narrower dtype": (one(dtype="F16"), "takes 16 bytes, but F16 [2, 2] needs 8"),
    "negative dimension": (one(shape=[-2, -2]), "non-negative integers"),
    "float dimension": (one(shape=[2.0, 2.0]), "non-negative integers"),
    "boolean dimension": (one(shape=[True, 4]), "non-negative integers"),
    "shape is a number": (one(shape=4), "non-negative integers"),
    "rank 9": (one(shape=[1] * 8 + [4]), "at most 8"),
    "dimension 2^64": (one(shape=[2**64, 1]), "needs 73786976294838206464"),
    "product wraps to 4": (one(shape=[2**62 + 1, 4]), "takes 16 bytes"),
    "product overflows": (one(shape=[2**40, 2**40]), "takes 16 bytes"),
    "negative offset": (one(data_offsets=[-16, 0]), "negative or reversed"),
    "reversed offsets": (one(data_offsets=[16, 0]), "negative or reversed"),
    "float offsets": (one(data_offsets=[0.0, 16.0]), "must have two integers"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "must have two integers"),
    "offsets are text": (one(data_offsets="0-16"), "must have two integers"),
    "offset past the end": (one(data_offsets=[1000, 1016]), "the file ends at"),
    "offset 2^62": (one(data_offsets=[2**62, 2**62 + 16]), "the file ends at"),
    "data cut by one byte": (safetensors_bytes({"a": A, "b": B}, D[:31]), "truncated"),
    "no data": (safetensors_bytes({"a": A}), "truncated"),
    "data left over": (safetensors_bytes({"a": A}, D), "16 bytes behind its last tensor"),
    "overlap": (safetensors_bytes({"a": A, "b": A | {"data_offsets": [8, 24]}}, D[:24]), "overlaps"),
    "same bytes": (safetensors_bytes({"a": A, "b": A}, D[:16]), "overlaps"),
    "gap": (safetensors_bytes({"a": A, "b": B | {"data_offsets": [20, 36]}}, D + D[:4]), "leaves a gap"),
    "gap in front": (safetensors_bytes({"a": B}, D), "leaves a gap"),
    "metadata is a list": (safetensors_bytes({"__metadata__": [], "a": A}, D[:16]), "__metadata__"),
    "metadata holds numbers": (safetensors_bytes({"__metadata__": {"x": 1}, "a": A}, D[:16]), "__metadata__"),
    "too many tensors": (
        safetensors_bytes({str(i): EMPTY for i in range(MAX_TENSORS + 1)}),
        f"more than {MAX_TENSORS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_false_header_is_refused_with_file_and_reason(name: str, tmp_path: Path) -> None:
    raw, reason = MUTATIONS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert reason in caught.value.message
    assert caught.value.file == str(path)


def test_flipped_header_bytes_never_crash(tmp_path: Path) -> None:
    """Damage is refused, or harmless (another name, another float type of the same size); and no large allocation."""
    path = tmp_path / "model.safetensors"
    save_file(hf_weights(), path)
    raw = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = random.Random(2)
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(header_end)] = rng.choice((0, 0x22, 0x2C, 0x30, 0x39, 0x5D, 0x7D, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            load(tmp_path)
        except CheckpointError as exc:
            assert str(path) in exc.message
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 150
    assert peak < 16 << 20


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(hf_weights(), path)
    raw = path.read_bytes()
    for end in range(0, len(raw), 13):
        path.write_bytes(raw[:end])
        with pytest.raises(CheckpointError):
            read_header(path)


# --- folders ---


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m | {"model.norm.weight": "absent.safetensors"}, "absent.safetensors, which is not there"),
        (lambda m: m | {"extra": "model-00001-of-00003.safetensors"}, "says it is here"),
        (lambda m: m | {"model.norm.weight": "../model.safetensors"}, "must name a file of its folder"),
        (lambda m: m | {"model.norm.weight": "/etc/passwd"}, "must name a file of its folder"),
        (lambda m: m | {"model.norm.weight": "pytorch_model.bin"}, "must name a file of its folder"),
        (lambda m: m | {"model.norm.weight": 3}, "must name a file of its folder"),
        (lambda _: [], "has no weight_map object"),
        (lambda _: {}, "has no weight_map object"),
    ],
)
def test_false_index_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    write_sharded(tmp_path, hf_weights())
    changed = change(index_of(tmp_path)["weight_map"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def test_missing_part_without_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, hf_weights())
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds 2 of 3 parts"):
        load(tmp_path)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'same': is also in a\.safetensors"):
        load(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="load-format dummy"):
        load(tmp_path)


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file(hf_weights(), tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="symbolic link out of the model folder"):
        load(folder)

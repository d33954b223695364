"""Old ``pytorch_model.bin`` files: tensors come out as they went in; nothing else comes out, and nothing is run."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.checkpoint.locate import locate_model
from octavo.errors import CheckpointError
from octavo.loader.source import LoadRequest
from octavo.loader.torch_bin import TorchBinSource, read_bin
from tests.unit.loader.builders import collect, hf_weights, request


def bin_request(path: Path) -> LoadRequest:
    return request(path, load_format="pt")


def write_sharded_bin(folder: Path, weights: dict[str, torch.Tensor], index: bool) -> None:
    weight_map = {}
    for i, (name, tensor) in enumerate(weights.items()):
        file = f"pytorch_model-{i + 1:05}-of-{len(weights):05}.bin"
        torch.save({name: tensor}, folder / file)
        weight_map[name] = file
    if index:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False])
def test_one_file(dtype: torch.dtype, is_zip: bool, tmp_path: Path) -> None:
    weights = hf_weights(dtype=dtype)
    # As saved by trainers: a parameter, a transposed view, two names for one storage, more than one slice.
    weights["p"] = torch.nn.Parameter(torch.randn(3, 4).to(dtype))
    weights["t"] = torch.randn(5, 7).to(dtype).t()
    weights["tied"] = weights["model.embed_tokens.weight"]
    weights["big"] = torch.randn(3000, 900).to(dtype)
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)).format == "pt"
    read = collect(TorchBinSource(bin_request(tmp_path)))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name].detach()) for name in weights)


@pytest.mark.parametrize("index", [True, False])
def test_sharded(index: bool, tmp_path: Path) -> None:
    weights = hf_weights()
    write_sharded_bin(tmp_path, weights, index)
    read = collect(TorchBinSource(bin_request(tmp_path)))
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"2 of 3 parts|names the file pytorch_model-00002-of-00003\.bin"):
        collect(TorchBinSource(bin_request(tmp_path)))


def test_state_dict_inside_a_trainer_s_dictionary(tmp_path: Path) -> None:
    torch.save({"state_dict": hf_weights(), "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert collect(TorchBinSource(bin_request(tmp_path))).keys() == hf_weights().keys()


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "hostile",
    [
        lambda trace: Call(os.system, f"touch {trace}"),
        lambda trace: Call(builtins.eval, f"open({str(trace)!r}, 'w')"),
        lambda trace: Call(builtins.exec, f"open({str(trace)!r}, 'w')"),
        lambda trace: Call(open, str(trace), "w"),
        lambda trace: Call(torch.save, torch.ones(1), str(trace)),
        lambda trace: Call(os.symlink, "/etc/passwd", str(trace)),
        lambda trace: {"x": torch.ones(1), "y": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(trace))))},
    ],
    ids=["system", "eval", "exec", "open", "torch.save", "symlink", "nested"],
)
def test_hostile_pickles_are_refused_and_not_run(
    hostile: Callable[[Path], object], is_zip: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    weights: dict[str, Any] = {**hf_weights(), "evil": hostile(trace)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="asks for more than tensors, which could run any code") as caught:
        collect(TorchBinSource(bin_request(tmp_path)))
    assert "pytorch_model.bin" in caught.value.message
    assert not trace.exists()


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A few kilobytes that would become gigabytes."""
    plain, packed = tmp_path / "plain.bin", tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert packed.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_bin(packed)


BAD: list[tuple[object, str]] = [
    ([torch.ones(1)], "holds a list"),
    ({"x": 3}, "'x', which is no tensor"),
    ({3: torch.ones(1)}, "'3', which is no tensor"),
    ({"x": torch.ones(1).expand(10_000_000)}, "more values than its storage"),
    ({"x": torch.ones(4).to_sparse()}, "is not a plain tensor"),
]


@pytest.mark.parametrize(("content", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_other_content_is_refused(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=reason):
        read_bin(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_files_end_with_a_clear_error(is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(hf_weights(), path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            read_bin(path)
    path.write_bytes(b"PK\x03\x04" + os.urandom(500))
    with pytest.raises(CheckpointError):
        read_bin(path)


def test_index_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save(hf_weights(), tmp_path / "outside.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside.bin"}}))
    with pytest.raises(CheckpointError, match="must name a file of its folder"):
        collect(TorchBinSource(bin_request(folder)))
    (folder / "a.bin").symlink_to(tmp_path / "outside.bin")
    index.write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    with pytest.raises(CheckpointError, match="symbolic link out of the model folder"):
        collect(TorchBinSource(bin_request(folder)))

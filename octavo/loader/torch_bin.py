"""Weights from old ``pytorch_model*.bin`` files: pickles, read with torch's unpickler for weights only.

A pickle may name any function to be called while it is read. Torch's ``weights_only`` unpickler knows tensors and plain
containers and refuses every other name, and here a refusal says so and ends loading. What it lets through is checked
too: archives must be stored uncompressed and within the file (so that a small file cannot grow), and a tensor's values
must lie within its storage. Safetensors files are read faster and need none of this: where a folder has both, they win.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint.files import read_json_object, resolve_in_folder
from octavo.errors import CheckpointError
from octavo.loader.source import SLICE_BYTES, LoadRequest, RowSlice

INDEX_NAME = "pytorch_model.bin.index.json"
WHOLE_NAME = "pytorch_model.bin"
_PART = re.compile(r"pytorch_model-\d{1,6}-of-(\d{1,6})\.bin")
_MAX_REASON = 300


class TorchBinSource:
    """Yields the tensors of ``pytorch_model.bin``, or of its parts one file after the other."""

    def __init__(self, request: LoadRequest) -> None:
        self._path = Path(request.load_config.path)

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        """See WeightSource. One file is held at a time, mapped where its format allows that."""
        owner: dict[str, str] = {}
        for file in find_bin_files(self._path):
            tensors = read_bin(file)
            for name in tensors:
                if name in owner:
                    raise CheckpointError(str(file), f"is also in {owner[name]}", tensor=name)
                owner[name] = file.name
            for name, tensor in tensors.items():
                if wanted(name):
                    for piece in _pieces(tensor):
                        yield name, piece


def _pieces(tensor: Tensor) -> Iterator[Tensor | RowSlice]:
    size = tensor.numel() * tensor.element_size()
    if size <= SLICE_BYTES or tensor.dim() < 2:
        yield tensor
        return
    rows = max(1, SLICE_BYTES // (size // tensor.shape[0]))
    for row in range(0, tensor.shape[0], rows):
        yield RowSlice(tensor[row : row + rows], row, tensor.shape[0])


def find_bin_files(path: Path) -> list[Path]:
    """The weight files of a folder; other pickles in it (of optimizers, training arguments) are left alone.

    Raises:
        CheckpointError: There is none, or one of several parts is missing.
    """
    if path.is_file():
        return [path]
    if (path / INDEX_NAME).exists():
        return _from_index(path)
    if (path / WHOLE_NAME).exists():
        return [path / WHOLE_NAME]
    files = sorted(p for p in path.glob("pytorch_model-*.bin") if _PART.fullmatch(p.name))
    if not files:
        raise CheckpointError(str(path), f"holds neither {WHOLE_NAME} nor {INDEX_NAME}")
    expected = {int(match.group(1)) for file in files if (match := _PART.fullmatch(file.name))}
    if expected != {len(files)}:
        raise CheckpointError(str(path), f"holds {len(files)} of {max(expected)} parts: {files[0].name} and so on")
    return files


def _from_index(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), "has no weight_map object")
    files: dict[str, str] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".bin"):
            raise CheckpointError(str(index), f"names {file!r:.200}, but must name a file of its folder", tensor=tensor)
        if files.setdefault(file, tensor) == tensor and not (folder / file).exists():
            raise CheckpointError(str(index), f"names the file {file}, which is not there", tensor=tensor)
    return [folder / file for file in sorted(files)]


def read_bin(path: Path) -> Mapping[str, Tensor]:
    """All tensors of one file, on the host.

    Raises:
        CheckpointError: The file wants more than tensors, is damaged, or is no such file.
    """
    target = resolve_in_folder(path)
    file = str(path)
    try:
        is_zip = zipfile.is_zipfile(target)
        if is_zip:
            _check_archive(target, file)
        loaded = torch.load(target, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as exc:
        reason = " ".join(str(exc).split())[:_MAX_REASON]
        raise CheckpointError(
            file,
            "is a pickle that asks for more than tensors, which could run any code, and is not read; if you trust it, "
            f"convert it to safetensors where that can do no harm ({reason})",
        ) from exc
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as exc:
        reason = " ".join(str(exc).split())[:_MAX_REASON]
        raise CheckpointError(file, f"is not a file of weights that can be read: {reason}") from exc
    return _check_tensors(loaded, file)


def _check_archive(path: Path, file: str) -> None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as exc:
        raise CheckpointError(file, f"is a damaged archive: {exc}") from exc
    total = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(file, f"holds {entry.filename[:100]!r} compressed, which torch does not write")
        total += entry.file_size
    if total > size:
        raise CheckpointError(file, f"claims {total} bytes of content, but has only {size}")


def _check_tensors(loaded: Any, file: str) -> Mapping[str, Tensor]:
    # Some training scripts put the weights under this name, beside their own state.
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise CheckpointError(file, f"holds a {type(loaded).__name__}, but must hold names and tensors")
    result: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(file, f"holds {str(name)[:100]!r}, which is no tensor")
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(file, "is not a plain tensor of numbers", tensor=name)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(file, "has more values than its storage, by strides of 0", tensor=name)
        result[name] = tensor
    return result

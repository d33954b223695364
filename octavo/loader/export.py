"""Write a GGUF model as a Hugging Face folder: safetensors, config.json and tokenizer files.

For comparing with other engines, and for tools that read only that layout. Streams: one slice of one tensor is in
memory at a time. Run as ``python -m octavo.loader.export model.gguf folder --dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.locate import LocatedModel, locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.checkpoint.tokenizer_folder import write_tokenizer
from octavo.config.sections import LoadConfig
from octavo.errors import ConfigError, OctavoError
from octavo.loader.gguf import GGUFSource, gguf_parts
from octavo.loader.source import LoadRequest, RowSlice

_DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}


def export_hf(gguf_path: str | Path, out_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Write ``gguf_path`` as a Hugging Face folder.

    Args:
        gguf_path: The GGUF file.
        out_dir: Made if it does not exist; files of the same names are replaced.
        dtype: Of all tensors written: float32, float16 or bfloat16.

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: The GGUF file is damaged.
        ConfigError: ``dtype`` is none of the three.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, but must be one of {', '.join(_DTYPES)}", param="dtype")
    path, folder = Path(gguf_path), Path(out_dir)
    config = read_model_config(LocatedModel(str(path), str(path), "gguf"))
    folder.mkdir(parents=True, exist_ok=True)
    load_config = LoadConfig(model=str(path), path=str(path), load_format="gguf", revision=None, seed=0)
    with GGUFFile(path, strings=()) as gguf:
        shapes = {part.name: part.full_shape for _, part in gguf_parts(gguf, config)}
    source = GGUFSource(LoadRequest(load_config, config, shapes))
    _write_safetensors(folder / "model.safetensors", shapes, source, dtype)
    _write_json(folder / "config.json", {**config.hf, "torch_dtype": dtype})
    generation = dict(config.generation_defaults)
    if config.bos_token_id is not None:
        generation["bos_token_id"] = config.bos_token_id
    _write_json(folder / "generation_config.json", {**generation, "eos_token_id": list(config.eos_token_ids)})
    write_tokenizer(folder, load_tokenizer_data(path))
    return folder


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], source: GGUFSource, dtype: str) -> None:
    """The header is known before any value is: every tensor gets its place, in the order in which the source yields."""
    kind, torch_dtype = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, piece in source.tensors(lambda _: True):
            tensor = piece.tensor if isinstance(piece, RowSlice) else piece
            row_start = piece.row_start if isinstance(piece, RowSlice) else 0
            row_bytes = math.prod(shapes[name][1:]) * torch_dtype.itemsize
            f.seek(8 + len(text) + header[name]["data_offsets"][0] + row_start * row_bytes)
            f.write(tensor.to(torch_dtype).contiguous().view(torch.uint8).numpy().tobytes())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write a GGUF model as a Hugging Face folder.")
    parser.add_argument("model", help="GGUF file or alias")
    parser.add_argument("out_dir")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(_DTYPES))
    args = parser.parse_args()
    try:
        export_hf(locate_model(args.model).path, args.out_dir, args.dtype)
    except OctavoError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

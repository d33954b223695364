"""From a load format to its WeightSource: our own table, then import paths, then entry points of other packages."""

from __future__ import annotations

from octavo.loader.source import LoadRequest, WeightSource
from octavo.utils.registry import Registry

SOURCES = Registry(
    "load format",
    "load_format",
    "octavo.weight_sources",
    {
        "safetensors": "octavo.loader.safetensors:SafetensorsSource",
        "gguf": "octavo.loader.gguf:GGUFSource",
        "pt": "octavo.loader.torch_bin:TorchBinSource",
        "dummy": "octavo.loader.dummy:DummySource",
    },
    absent={"bin": "pytorch_model.bin files are read by load_format pt"},
)
"""Each class is constructed with a LoadRequest."""


def open_source(load_format: str, request: LoadRequest) -> WeightSource:
    """The source that reads ``load_format``.

    Raises:
        ConfigError: Nothing has that name, or it cannot be imported.
    """
    return SOURCES.load(load_format)(request)

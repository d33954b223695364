"""Quantisation method by name. Third parties: an import path or the entry point group ``octavo.quantization``."""

from __future__ import annotations

import torch

from octavo.quantization.method import QuantizationMethod
from octavo.utils.registry import Registry

_NOT_YET = "this version computes with none or int8 only"

METHODS = Registry(
    "quantization method",
    "quantization",
    "octavo.quantization",
    {"none": "octavo.quantization.unquantized:Unquantized", "int8": "octavo.quantization.int8:Int8"},
    # MXFP4 is decoded while it is loaded (loader/mxfp4.py); what is multiplied has the dtype of the model.
    aliases={"w8a8": "int8", "unquantized": "none", "mxfp4": "none"},
    absent=dict.fromkeys(("fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors", "gguf", "int4"), _NOT_YET),
    normalise=str.lower,
)


def make_method(name: str, device: torch.device | str = "cpu") -> QuantizationMethod:
    """An instance of the named method for one device.

    Raises:
        ConfigError: No such method; lists those that exist.
    """
    return METHODS.load(name)(device)

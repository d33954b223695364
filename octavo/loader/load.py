"""load_weights: the one call that fills a model."""

from __future__ import annotations

import logging
import time

import torch

from octavo.config.model import ModelConfig
from octavo.config.sections import LoadConfig
from octavo.device.device import Device
from octavo.layers.parameter import collect_slots
from octavo.loader.mapping import Placement, fill
from octavo.loader.mxfp4 import Mxfp4Source
from octavo.loader.registry import open_source
from octavo.loader.source import LoadRequest
from octavo.loader.text_half import text_half
from octavo.models.interface import CausalLM

logger = logging.getLogger(__name__)


def load_weights(
    model: CausalLM,
    load_config: LoadConfig,
    model_config: ModelConfig,
    device: Device | None = None,
) -> None:
    """Fill every parameter of ``model``, streaming: peak memory is the weights and a few megabytes.

    Args:
        model: With empty weights; its ``weight_map`` names what the checkpoint calls its parameters.
        load_config: Which source, and where.
        model_config: Of this model; GGUF needs the number of heads.
        device: Where the parameters are, and what brings tensors there without waiting; None for the host.

    Raises:
        ConfigError: No source of that name.
        CheckpointError: The checkpoint is damaged or does not fit the model; nothing of it may be used then.
    """
    start_s = time.perf_counter()
    weight_map = model.weight_map
    if model_config.text_half_of is not None:
        logger.info(
            "loading the language model of %s: text in, text out, no pictures and no sound", model_config.text_half_of
        )
        weight_map = text_half(weight_map)
    placement = Placement(collect_slots(model), weight_map)
    torch_device = torch.device("cpu") if device is None else device.torch_device
    request = LoadRequest(load_config, model_config, placement.expected(), torch_device)
    source = open_source(load_config.load_format, request)
    if str((model_config.quantization or {}).get("quant_method")).lower() == "mxfp4":
        source = Mxfp4Source(source, request)
    num_bytes = fill(placement, source, load_config.path or load_config.model, device)
    logger.info(
        "loaded weights of %s (%s): %.2f GB of values in %.1f s",
        load_config.model, load_config.load_format, num_bytes / 1e9, time.perf_counter() - start_s,
    )  # fmt: skip

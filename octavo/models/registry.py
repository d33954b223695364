"""Architecture name to model class. Third parties add theirs through the entry point group ``octavo.models``."""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.layers.context import LayerContext
from octavo.models.interface import CausalLM
from octavo.utils.registry import Registry

MODELS = Registry(
    "model architecture",
    "model",
    "octavo.models",
    {
        "LlamaForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "Qwen3ForCausalLM": "octavo.models.qwen3:Qwen3ForCausalLM",
    },
)


def build_model(config: ModelConfig, context: LayerContext) -> CausalLM:
    """The model of ``config.architecture`` with empty weights.

    Raises:
        ConfigError: The architecture is unknown (lists those that exist), or the model refuses its config.
    """
    return MODELS.load(config.architecture)(config, context)

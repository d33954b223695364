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
        "Gemma2ForCausalLM": "octavo.models.gemma:Gemma2ForCausalLM",
        "Gemma3ForCausalLM": "octavo.models.gemma:Gemma3ForCausalLM",
        "GemmaForCausalLM": "octavo.models.gemma:GemmaForCausalLM",
        "GraniteForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "LlamaForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "Olmo2ForCausalLM": "octavo.models.olmo2:Olmo2ForCausalLM",
        "Olmo3ForCausalLM": "octavo.models.olmo2:Olmo2ForCausalLM",
        "Phi3ForCausalLM": "octavo.models.phi3:Phi3ForCausalLM",
        "PhiForCausalLM": "octavo.models.phi:PhiForCausalLM",
        "Qwen2ForCausalLM": "octavo.models.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "octavo.models.qwen3:Qwen3ForCausalLM",
        "SmolLM3ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    },
)


def build_model(config: ModelConfig, context: LayerContext) -> CausalLM:
    """The model of ``config.architecture`` with empty weights.

    Raises:
        ConfigError: The architecture is unknown (lists those that exist), or the model refuses its config.
    """
    return MODELS.load(config.architecture)(config, context)

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
        "DeepseekV2ForCausalLM": "octavo.models.deepseek:DeepseekForCausalLM",
        "DeepseekV3ForCausalLM": "octavo.models.deepseek:DeepseekForCausalLM",
        "Gemma2ForCausalLM": "octavo.models.gemma:Gemma2ForCausalLM",
        "Gemma3ForCausalLM": "octavo.models.gemma:Gemma3ForCausalLM",
        "GemmaForCausalLM": "octavo.models.gemma:GemmaForCausalLM",
        "GptOssForCausalLM": "octavo.models.gpt_oss:GptOssForCausalLM",
        "GraniteForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "GraniteMoeForCausalLM": "octavo.models.mixtral:GraniteMoeForCausalLM",
        "LlamaForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "MixtralForCausalLM": "octavo.models.mixtral:MixtralForCausalLM",
        "Olmo2ForCausalLM": "octavo.models.olmo2:Olmo2ForCausalLM",
        "Olmo3ForCausalLM": "octavo.models.olmo2:Olmo2ForCausalLM",
        "OlmoeForCausalLM": "octavo.models.qwen_moe:OlmoeForCausalLM",
        "Phi3ForCausalLM": "octavo.models.phi3:Phi3ForCausalLM",
        "PhiForCausalLM": "octavo.models.phi:PhiForCausalLM",
        "PhiMoEForCausalLM": "octavo.models.phimoe:PhimoeForCausalLM",
        "PhimoeForCausalLM": "octavo.models.phimoe:PhimoeForCausalLM",
        "Qwen2ForCausalLM": "octavo.models.qwen2:Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM": "octavo.models.qwen_moe:Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM": "octavo.models.qwen3:Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM": "octavo.models.qwen_moe:Qwen3MoeForCausalLM",
        "SmolLM3ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    },
)


def build_model(config: ModelConfig, context: LayerContext) -> CausalLM:
    """The model of ``config.architecture`` with empty weights.

    Raises:
        ConfigError: The architecture is unknown (lists those that exist), or the model refuses its config.
    """
    return MODELS.load(config.architecture)(config, context)

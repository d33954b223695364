"""Architecture name to model class. Third parties add theirs through the entry point group ``octavo.models``."""

from __future__ import annotations

import importlib
import logging

from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.context import LayerContext
from octavo.models.interface import CausalLM
from octavo.utils.registry import Registry

logger = logging.getLogger(__name__)

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
        "Ministral3ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
        "MinistralForCausalLM": "octavo.models.llama:LlamaForCausalLM",
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


TRANSFORMERS_IMPL = "octavo.models.transformers_impl:TransformersForCausalLM"


def build_model(config: ModelConfig, context: LayerContext, impl: str = "auto") -> CausalLM:
    """The model of ``config.architecture`` with empty weights.

    Args:
        config: Of the model.
        context: Of its layers.
        impl: ``octavo``, ``transformers`` (that package's code with our attention), or ``auto``: the former where it
            exists.

    Raises:
        ConfigError: Nobody has the architecture (lists those that exist), or the model refuses its config.
    """
    name = config.architecture
    if impl == "octavo" or (impl == "auto" and MODELS.knows(name)):
        return MODELS.load(name)(config, context)
    if impl == "auto":
        logger.info("model_impl = transformers (Octavo has no %s of its own)", name)
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        known = f"Octavo has {', '.join(MODELS.names())} of its own"
        raise ConfigError(
            f"{name} would run with the code of transformers, which cannot be imported ({error}): "
            f"pip install octavo[transformers]. {known}.",
            param="model_impl",
        ) from error
    return MODELS.load(TRANSFORMERS_IMPL)(config, context)

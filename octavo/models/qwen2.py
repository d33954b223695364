"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values. Paper: Yang et al., "Qwen2", 2024."""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.models.decoder import DecoderForCausalLM, DecoderOptions


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Some of its layers may look through a window; the config says which."""

    def options(self, config: ModelConfig) -> DecoderOptions:  # noqa: ARG002
        """The biases are not in the config: they are always there."""
        return DecoderOptions(qkv_bias=True)

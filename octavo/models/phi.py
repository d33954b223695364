"""Phi-1, 1.5 and 2: attention and feed-forward side by side behind one LayerNorm, biases everywhere, partial rotation.

Paper: Li et al., "Textbooks Are All You Need II: phi-1.5", 2023.
"""

from __future__ import annotations

from octavo.config.model import ModelConfig
from octavo.errors import ConfigError
from octavo.layers.norm import LayerNorm
from octavo.models.decoder import DECODER_WEIGHTS, BlockNorms, DecoderForCausalLM, DecoderOptions, PlainMLP
from octavo.models.interface import WeightMap


class PhiForCausalLM(DecoderForCausalLM):
    """Its head has a bias too."""

    weight_map = WeightMap(
        shards=DECODER_WEIGHTS.shards[:3],
        ignored=DECODER_WEIGHTS.ignored,
        renames=(("dense", "o_proj"), ("fc1", "up_proj"), ("fc2", "down_proj"), ("final_layernorm", "norm")),
    )

    def options(self, config: ModelConfig) -> DecoderOptions:
        """Nothing of it is optional but ``qk_layernorm`` and tied embeddings, which no released model has.

        Raises:
            ConfigError: The config asks for one of them.
        """
        for name in ("qk_layernorm", "tie_word_embeddings"):
            if config.hf.get(name):
                raise ConfigError(f"{name} is true, which is not supported for Phi", param=name)
        return DecoderOptions(
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
            norm=LayerNorm,
            norms=BlockNorms(mlp_input=None),
            is_parallel=True,
            make_mlp=PlainMLP,
        )

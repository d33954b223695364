"""What a model is, as its ``config.json`` (or a GGUF header put into the same words) says it. Knows no torch.

Family-specific fields stay in ``hf``; the fields here are those that more than one part of the engine reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.config.mla import MlaConfig
from octavo.config.moe import MoeConfig
from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. ``scaling`` is Hugging Face's ``rope_scaling`` with ``rope_type`` normalised
    (``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn``, ``longrope``); empty means plain."""

    theta: float = 10000.0
    scaling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    partial_rotary_factor: float = 1.0

    def max_length(self, trained: int) -> int:
        """The longest text for a model of so many trained positions: YaRN's factor and that of linear scaling stretch
        the original ones, and many configs leave ``max_position_embeddings`` at those."""
        if self.scaling.get("rope_type") not in ("linear", "yarn"):
            return trained
        original = self.scaling.get("original_max_position_embeddings", trained)
        return max(trained, int(min(original * self.scaling.get("factor", 1.0), 2**31 - 1)))


@dataclass(frozen=True, slots=True)
class CheckpointCode:
    """Python code that comes with a checkpoint. It runs only where ``is_trusted``."""

    folder: str
    classes: Mapping[str, str]
    """What transformers' ``auto_map`` names: kind, such as ``AutoModelForCausalLM``, to ``file.Class``."""
    is_trusted: bool = False
    """The user allowed it (``trust_remote_code``), and nobody else has the model."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that hold the classes, without what these import."""
        modules = (reference.rpartition(".")[0] for reference in self.classes.values())
        return tuple(sorted({f"{module}.py" for module in modules}))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions and token ids of a decoder."""

    architecture: str
    """Hugging Face class name, such as ``LlamaForCausalLM``; the key of the model registry."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    """Added to the mean square, or to the variance, in every norm."""
    rope: RopeConfig
    """Of every layer that ``layer_ropes`` does not speak of."""
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    """[num_layers] attention window of each layer, None = full; empty means all full."""
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    """[num_layers] rotary embedding of each layer, None = no positions; empty means ``rope`` in all."""
    attention_scale: float | None = None
    """Multiplies q·k; None = ``head_dim ** -0.5``."""
    attention_softcap: float | None = None
    """Scores become ``cap * tanh(score / cap)``."""
    has_sinks: bool = False
    """Every head has one more score in its softmax, learned, without a value."""
    logit_softcap: float | None = None
    """The same for the output."""
    embedding_scale: float = 1.0
    """Multiplies what comes out of the embedding."""
    residual_scale: float = 1.0
    """Multiplies what attention and feed-forward add to the residual stream."""
    logit_scale: float = 1.0
    """Multiplies the output, before its soft-cap."""
    text_half_of: str | None = None
    """Architecture of the multimodal checkpoint whose language model this is; its weights lie under other names."""
    code: CheckpointCode | None = None
    """Python code of its own that the checkpoint comes with."""
    moe: MoeConfig | None = None
    """Mixtures of experts; None = every layer has one feed-forward."""
    mla: MlaConfig | None = None
    """Latent attention, expanded: ``head_dim`` and ``num_kv_heads`` are those of the expanded heads."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """From config.json and generation_config.json together."""
    dtype: str = "float32"
    """The checkpoint's: float32, float16 or bfloat16."""
    quantization: Mapping[str, Any] | None = None
    """``quantization_config`` of the checkpoint."""
    generation_defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Sampling defaults of generation_config.json (temperature, top_p, ...), SamplingParams' names."""
    hf: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The whole config.json."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"model config: {name} is {value!r}, but must be an integer in [1, 2^31)", param=name)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})",
                param="num_kv_heads",
            )
        for name in ("layer_windows", "layer_ropes"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_layers:
                raise ConfigError(f"model config: {name} must have one entry per layer", param=name)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        return self.rope.max_length(self.max_position_embeddings)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """[num_layers] attention windows."""
        return self.layer_windows or (None,) * self.num_layers

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """[num_layers] rotary embeddings, None = no positions."""
        return self.layer_ropes or (self.rope,) * self.num_layers

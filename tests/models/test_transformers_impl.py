"""Models of transformers over our paged attention compute what transformers computes alone, or say why they cannot.

Red when: a window, cap, scale or position gets lost on the way through the attention interface; when a checkpoint name
is not found; when a model that would be wrong is run.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 72,
    "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256, "vocab_size": 101, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPT = {**SIZES, "ffn_dim": 72, "word_embed_proj_dim": 32, "init_std": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": SIZES,
    "opt": OPT,
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": 20},
    "cohere2": {**SIZES, "sliding_window": 20},  # windows in some layers, no positions in others, scaled logits
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 20},  # soft-caps
    # Experts that are stacked while loading.
    "ernie4_5_moe": {**GROUPED, "head_dim": 8, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "apertus": GROUPED,  # parameters without dimensions
    "afmoe": {**GROUPED, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "llama": GROUPED,
    "granite_swa": {**GROUPED, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},  # sinks
    "gpt_oss": {
        **GROUPED, "head_dim": 8, "sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
FORCED = ("gemma2", "gpt_oss", "llama")
PROMPTS = [
    torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 60, 1, 33)
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(model_type: str, options: dict[str, Any], folder: Path) -> PreTrainedModel:
    """A random model, norms and biases included, and its checkpoint."""
    torch.manual_seed(len(model_type))
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "act_fn" not in name:
                parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(32):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def start(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "num_threads": 1, "dtype": "float32", **settings})


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_same_tokens_and_logprobs(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch of mixed lengths in chunks of 24 tokens, over contexts several windows long; then cached prefixes."""
    model = make(model_type, CASES[model_type], tmp_path)
    impl = "transformers" if model_type in FORCED else "auto"
    limits: dict[str, Any] = {"num_gpu_blocks_override": 80, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    with caplog.at_level(logging.INFO), start(tmp_path, model_impl=impl, **limits) as llm:
        assert llm.ready.weights_bytes > 50_000
        assert model_type in FORCED or "model_impl = transformers" in caplog.text
        wanted = [greedy(model, prompt) for prompt in PROMPTS]
        for _ in range(2):
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == wanted
        assert outputs[1].num_cached_tokens == 48
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    for position, entries in enumerate(output.prompt_logprobs[1:]):
        assert entries is not None
        token_id = PROMPTS[1][position + 1]
        assert abs(entries[token_id].logprob - logprobs[position, token_id].item()) <= 1e-4


def test_windows_have_kv_groups_of_their_own(tmp_path: Path) -> None:
    make("cohere2", CASES["cohere2"] | {"num_hidden_layers": 4}, tmp_path)
    with start(tmp_path, kv_cache_memory_bytes=64 << 20) as llm:
        windowed = llm.ready.num_blocks
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with start(tmp_path, kv_cache_memory_bytes=64 << 20) as llm:
        assert windowed > llm.ready.num_blocks  # blocks of fewer layers each


def test_names_without_the_backbones_prefix_and_old_tables(tmp_path: Path) -> None:
    """As GPT-2 is stored on the hub."""
    from safetensors.torch import load_file, save_file

    model = make("gpt2", {**GPT, "pad_token_id": 0}, tmp_path)  # its code looks for padding
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    with start(tmp_path, num_gpu_blocks_override=80) as llm:
        (output,) = llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == greedy(model, PROMPTS[0])


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("falcon", {**SIZES, "alibi": False}, "does not go through transformers' attention interface"),
        ("mamba", {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 101}, "recurrent|layers of the kinds"),
        ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 101}, "no position_ids"),
        ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "layers of the kinds conv"),
    ],
)
def test_the_reason_why_not(model_type: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, **options)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        start(tmp_path, load_format="dummy")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    make("gpt_neox", SIZES, tmp_path)
    with pytest.raises(ConfigError, match="'GPTNeoXForCausalLM' is not known"):
        start(tmp_path, model_impl="octavo")
    with pytest.raises(ConfigError, match="quantization is int8"):
        start(tmp_path, quantization="int8")
    edit(tmp_path, lambda config: config.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(ConfigError, match="dynamic RoPE depends on the longest text"):
        start(tmp_path)
    edit(tmp_path, lambda config: config.update(model_type="nobody_knows_this", rope_parameters={}))
    with pytest.raises(ConfigError, match="no causal LM for model_type 'nobody_knows_this'"):
        start(tmp_path)


def test_without_transformers_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("gpt_neox", SIZES, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install octavo\[transformers\]\. Octavo has .*LlamaForCausalLM"):
        start(tmp_path)

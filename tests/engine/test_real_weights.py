"""SmolLM2-135M as GGUF and as safetensors: the same answers, the same probabilities, transformers' perplexity.

``python -m benchmarks.perplexity --against transformers`` is the long version.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.perplexity import cut, octavo_perplexity, reference_text, transformers_perplexity
from octavo import LLM, SamplingParams
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from tests.tokenization.texts import sample_texts

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "num_threads": 1, "max_num_seqs": 4, "max_model_len": 512, "kv_cache_memory_bytes": "200M",
}  # fmt: skip
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Es war einmal ein König, der", "1, 2, 4, 8, 16, 32,"]


@pytest.fixture(scope="module")
def from_gguf() -> Iterator[LLM]:
    with LLM(**SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def from_folder(smollm2_folder: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_folder), **SETTINGS) as llm:
        yield llm


def test_the_export_has_the_same_config_and_tokens(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    found, expected = (read_model_config(locate_model(str(path))) for path in (smollm2_folder, smollm2_gguf))
    for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "rope", "rms_norm_eps", "eos_token_ids"):
        assert getattr(found, name) == getattr(expected, name), name
    ours, theirs = (load_tokenizer_data(path).tokenizer for path in (smollm2_folder, smollm2_gguf))
    for text in sample_texts()[::4]:
        assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.slow
def test_safetensors_and_gguf_answer_alike(from_gguf: LLM, from_folder: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=0)
    for ours, theirs in zip(from_folder.generate(PROMPTS, params), from_gguf.generate(PROMPTS, params), strict=True):
        a, b = ours.outputs[0], theirs.outputs[0]
        assert a.token_ids == b.token_ids
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(from_gguf: LLM, from_folder: LLM, smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    token_ids = from_gguf.get_tokenizer().encode(reference_text()[:20_000], add_special_tokens=False)
    windows = cut(token_ids, 256, 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype="float32")
    expected = transformers_perplexity(model, windows)
    assert 5 < expected < 60
    for llm in (from_gguf, from_folder):
        assert octavo_perplexity(llm, windows) == pytest.approx(expected, rel=1e-3)

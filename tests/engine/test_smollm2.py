"""The embedded model against transformers: the same greedy tokens and perplexity from the same float32 weights, which
are read from GGUF, and from safetensors.

``python -m benchmarks.perplexity --against transformers`` reads more text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.perplexity import cut, octavo_perplexity, reference_text, transformers_perplexity
from octavo import LLM, RequestOutput, SamplingParams
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from tests.tokenization.texts import sample_texts

NUM_TOKENS = 64
TWO_PROMPTS = ["def fibonacci(n):\n", "The old king of the north"]
TIE = 1e-4
"""Logits that lie closer are equal: sums of another order differ by up to 7e-5 here."""
LENGTHS = [5, 6, 8, 12, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 100, 200, 333, 512, 900, 1500]
TEXT = (
    "The lighthouse stood at the end of a narrow spit of land, and every evening its keeper climbed the ninety-one "
    "steps with a can of oil. Below, the harbour of {place} filled with boats whose names he knew by heart. He wrote "
    "in his book: wind from the {wind}, {number} sails in sight, the glass falling. Then he trimmed the wick, polished "
    "the brass and thought about a letter from his sister, who kept bees inland and asked each spring when he would "
    "come. def area(radius): return 3.14159 * radius ** 2  # metres. Water boils at {number} degrees below. "
)


def make_texts() -> list[str]:
    """Twenty texts that begin differently and are long enough for their lengths."""
    places = ["Brest", "Oslo", "Cork", "Genoa", "Kiel"]
    winds = ["north", "south-east", "west", "east"]
    return [
        f"{number}. "
        + "".join(
            TEXT.format(place=places[(number + part) % 5], wind=winds[(number * part) % 4], number=number * 7 + part)
            for part in range(20)
        )
        for number in range(len(LENGTHS))
    ]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", num_threads=1, max_num_seqs=20, kv_cache_memory_bytes="1G") as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    return [tokenizer.encode(text)[:length] for text, length in zip(make_texts(), LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def ours(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2))


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> Any:
    """transformers' model of the same weights."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype="float32")


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(
    reference: Any, prompts: list[list[int]], ours: list[RequestOutput]
) -> None:
    """Red when any of the tokenless path differs: weights, RoPE, attention over pages, chunked prefill, sampling.

    The reference reads each prompt together with our answer once: every one of our tokens must be its most likely one
    at that place. That is the same statement as generating 64 tokens, at a fraction of the time.
    """
    import torch

    assert [len(prompt) for prompt in prompts] == LENGTHS
    for prompt, output in zip(prompts, ours, strict=True):
        answer = output.outputs[0]
        assert len(answer.token_ids) == NUM_TOKENS
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer.token_ids[:-1]])
            logits = reference(ids, logits_to_keep=NUM_TOKENS).logits[0]
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        # One of the prompts leads to two tokens with the very same logit in transformers: either is the most likely.
        assert (logits.amax(-1) - chosen).max() < TIE, f"prompt of {len(prompt)} tokens"
        logprobs = torch.log_softmax(logits, -1)
        for position, token_id in enumerate(answer.token_ids):
            entry = (answer.logprobs or [])[position]
            assert entry is not None
            assert entry[token_id].logprob == pytest.approx(logprobs[position, token_id].item(), abs=1e-3)


def test_the_export_has_the_same_config_and_tokens(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    found, expected = (read_model_config(locate_model(str(path))) for path in (smollm2_folder, smollm2_gguf))
    for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "rope", "rms_norm_eps", "eos_token_ids"):
        assert getattr(found, name) == getattr(expected, name), name
    ours, theirs = (load_tokenizer_data(path).tokenizer for path in (smollm2_folder, smollm2_gguf))
    for text in sample_texts()[::4]:
        assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.slow
def test_safetensors_gguf_and_transformers_agree(reference: Any, llm: LLM, smollm2_folder: Path) -> None:
    """The same answers from both files, and transformers' perplexity on a text within 0.1 %."""
    token_ids = llm.get_tokenizer().encode(reference_text()[:12_000], add_special_tokens=False)
    windows = cut(token_ids, 256, 2)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
    answers = llm.generate(TWO_PROMPTS, params)
    expected = transformers_perplexity(reference, windows)
    assert 5 < expected < 60
    assert octavo_perplexity(llm, windows) == pytest.approx(expected, rel=1e-3)
    with LLM(str(smollm2_folder), dtype="float32", num_threads=1, kv_cache_memory_bytes="1G") as other:
        assert octavo_perplexity(other, windows) == pytest.approx(expected, rel=1e-3)
        for ours, theirs in zip(other.generate(TWO_PROMPTS, params), answers, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            assert ours.outputs[0].cumulative_logprob == pytest.approx(theirs.outputs[0].cumulative_logprob, abs=1e-3)


@pytest.mark.slow
def test_generating_step_by_step_agrees_too(
    reference: Any, prompts: list[list[int]], ours: list[RequestOutput]
) -> None:
    """The other way round for a few prompts: transformers generates by itself, with its own cache."""
    import torch

    # None: go on after an end-of-sequence token, as ignore_eos does; min_new_tokens would forbid it instead.
    reference.generation_config.eos_token_id = None
    for index in (0, 10, 15):
        prompt = torch.tensor([prompts[index]])
        with torch.inference_mode():
            generated = reference.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
        assert generated[0, prompt.shape[1] :].tolist() == ours[index].outputs[0].token_ids

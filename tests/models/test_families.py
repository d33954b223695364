"""Every family and variant against transformers, from a saved checkpoint through the normal path to tokens.

Red when: a config field is not read or misread, a tensor lands in the wrong place, a rotation, norm, bias, scale, cap,
mask or window is wrong, or keys that a window still needs are dropped (prompts are several windows long).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.config.sections import LoadConfig
from octavo.loader.load import load_weights
from tests.models.families import PAGE, VARIANTS, Variant, make_reference, page_with_table
from tests.models.harness import PagedModel

TOLERANCE = 1e-4
NUM_TOKENS = 32
torch.set_num_threads(1)  # threads cost more than they save on tiny models


@dataclass(frozen=True)
class Pair:
    """A variant in both worlds."""

    variant: Variant
    reference: PreTrainedModel
    llm: LLM

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """``[T, V]``, by transformers."""
        with torch.inference_mode():
            return self.reference(input_ids=torch.tensor([token_ids])).logits[0]

    def prompts(self) -> list[list[int]]:
        """Eight, of very different lengths."""
        rng, variant = random.Random(0), self.variant
        longest = variant.max_model_len - NUM_TOKENS
        lengths = [longest, variant.shortest] + [rng.randint(variant.shortest, longest) for _ in range(6)]
        vocab_size = 77  # the smallest of all
        return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    variant = VARIANTS[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    reference = make_reference(request.param)
    reference.save_pretrained(folder)
    llm = LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, num_threads=1, block_size=16, in_process=True,
        num_gpu_blocks_override=300, max_model_len=variant.max_model_len, max_num_seqs=8, max_num_batched_tokens=70,
        long_prefill_token_threshold=23, max_logprobs=-1, logprobs_mode="raw_logits",
    )  # fmt: skip
    yield Pair(variant, reference, llm)
    llm.close()


def test_logits_of_a_prompt(pair: Pair) -> None:
    """In chunks of 23 tokens, of which the last sees windows that begin in the middle of a block."""
    prompt = pair.prompts()[0]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True)
    (output,) = pair.llm.generate(prompt, params)
    expected = pair.logits(prompt)
    assert output.prompt_logprobs is not None
    got = torch.empty_like(expected[:-1])
    for position, values in enumerate(output.prompt_logprobs[1:]):
        assert values is not None and len(values) == expected.shape[1]
        for token_id, value in values.items():
            got[position, token_id] = value.logprob
    assert (got - expected[:-1]).abs().max() <= TOLERANCE


def test_greedy_tokens_of_a_batch_and_from_cached_prefixes(pair: Pair) -> None:
    """Each token is the one that transformers would choose after all before it, so the texts are the same."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = pair.prompts()
    first = pair.llm.generate(prompts, params)
    again = pair.llm.generate(prompts, params)
    assert any(output.num_cached_tokens for output in again)
    for prompt, one, other in zip(prompts, first, again, strict=True):
        tokens = list(one.outputs[0].token_ids)
        best = pair.logits(prompt + tokens).argmax(-1)
        assert tokens == best[len(prompt) - 1 : -1].tolist()
        assert tokens == list(other.outputs[0].token_ids)
    pair.llm._frontend.client.call("check_books")


def test_phimoe_beyond_its_first_length(tmp_path: Path) -> None:
    """transformers takes the short factors there, the model's own code the long ones: here both have the long ones."""
    rope = dict(VARIANTS["phimoe-short"].options["rope_parameters"])
    both_long = rope | {"short_factor": rope["long_factor"], "short_mscale": rope["long_mscale"]}
    reference = make_reference("phimoe-short", rope_parameters=both_long)
    reference.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, "rope_parameters": rope}))
    config = read_model_config(locate_model(str(tmp_path)))
    paged = PagedModel(config)
    load_weights(paged.model, LoadConfig(str(tmp_path), str(tmp_path), "safetensors", None, 0), config)
    prompt = [3 + (7 * index) % 70 for index in range(100)]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0]
    assert (paged.feed(0, prompt, 23) - expected).abs().max() <= TOLERANCE


def test_the_page_has_the_present_table() -> None:
    text = PAGE.read_text("utf-8")
    assert text == page_with_table(text), "run: python -m tests.models.families"

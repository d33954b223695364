"""The two shapes of the benchmark with fewer layers, in bfloat16: recorded and launched steps agree, and logits are
those of the CPU in float32 within the rounding of bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from tests.gpu.conftest import LLAMA, QWEN3, greedy, random_prompts, tokens_of

SHAPES = {
    "qwen3-0.6b": {
        **QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 2,
    },
    "llama-3.1-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 1,
    },
}  # fmt: skip
PROMPTS = random_prompts(8, longest=300)
LOGPROB_TOLERANCE = 0.15
"""Chosen, not fitted: two layers of products in bfloat16 (8 bits) over random weights."""
TIE = 0.05
"""Two logprobs in bfloat16 that are as good as equal."""


@pytest.fixture(params=SHAPES)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., LLM]:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[request.param]))

    def make(**settings: Any) -> LLM:
        return LLM(
            str(tmp_path),
            **{
                "load_format": "dummy",
                "device": "cuda",
                "dtype": "bfloat16",
                "skip_tokenizer_init": True,
                "num_gpu_blocks_override": 200,
                "max_num_seqs": 8,
                "in_process": True,
                **settings,
            },  # fmt: skip
        )

    return make


def run(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    try:
        return llm.generate(PROMPTS, params)
    finally:
        llm.close()


def test_recorded_steps_agree_with_launched_ones_in_bfloat16(start: Callable[..., LLM]) -> None:
    # Recorded prompts are filled up, so cuBLAS may take another order of the same sums. Tokens may differ, but only
    # where two were as good as equal. In float32 test_engine_equality asks for the same tokens.
    recorded, launched = tokens_of(run(start(), greedy(20))), tokens_of(run(start(enforce_eager=True), greedy(20)))
    texts: list[list[int]] = []
    pairs: list[set[int]] = []
    for prompt, [one], [other] in zip(PROMPTS, recorded, launched, strict=True):
        if one != other:
            at = next(index for index in range(20) if one[index] != other[index])
            texts.append([*prompt, *one[:at]])
            pairs.append({one[at], other[at]})
    llm = start(enforce_eager=True)
    try:
        last = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=1, logprobs=2)) if texts else []
    finally:
        llm.close()
    for output, pair in zip(last, pairs, strict=True):
        found = output.outputs[0].logprobs[0]
        assert pair <= set(found)
        values = [found[token].logprob for token in pair]
        assert abs(values[0] - values[1]) < TIE


def test_one_request_agrees_with_many(start: Callable[..., LLM]) -> None:
    """A batch of one has products of its own, without tensor cores: the same logits within rounding."""
    prompts = [list(range(5, 5 + length)) for length in (1, 40, 300)]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True)
    llm = start()
    try:
        alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in prompts]
        together = [output.outputs[0] for output in llm.generate(prompts, params)]
    finally:
        llm.close()
    for one, other in zip(alone, together, strict=True):
        for step, (mine, theirs) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            assert abs(one.logprobs[step][mine].logprob - other.logprobs[step][theirs].logprob) < LOGPROB_TOLERANCE
            if mine != theirs:
                break  # as good as equal, and not the same text any more


def test_logprobs_are_those_of_the_cpu_in_float32(start: Callable[..., LLM]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    gpu = run(start(), params)
    cpu = run(start(device="cpu", dtype="float32", block_size=16, num_gpu_blocks_override=800), params)
    worst = 0.0
    for one, other in zip(gpu, cpu, strict=True):
        for got, wanted in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert set(got) == set(wanted)
            worst = max(worst, *(abs(got[token].logprob - wanted[token].logprob) for token in wanted))
    assert worst < LOGPROB_TOLERANCE

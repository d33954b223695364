"""The same tokens, whatever else happens: batching, chunks, cached prefixes, preemption, depth, processes.

In float32 on a tiny model with random weights, against each prompt run alone. Sums in another order move logits by
1e-6; that decides nothing among these weights. A wrong position, block, row or seed changes tokens at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo import AsyncLLM, EngineArgs, RequestOutputKind, SamplingParams
from octavo.observability.metrics import Histogram
from tests.engine.conftest import MakeLLM, greedy, random_prompts, tokens_of

PROMPTS = random_prompts(16)
WAYS: dict[str, dict[str, Any]] = {
    "batch of 16": {},
    "chunks of 1": {"long_prefill_token_threshold": 1},
    "chunks of 7": {"long_prefill_token_threshold": 7},
    "steps of 64 tokens": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "whole prompts only": {"enable_chunked_prefill": False, "max_model_len": 512, "max_num_batched_tokens": 512},
    "no prefix cache": {"enable_prefix_caching": False},
    "blocks of 64": {"block_size": 64, "num_gpu_blocks_override": 160},
    "depth 2": {"async_scheduling": True},
    "another process": {"in_process": False},
    "another process, depth 2": {"in_process": False, "async_scheduling": True},
    # 29 blocks of 16 tokens for 16 prompts that want up to 12 each.
    "preempted": {"num_gpu_blocks_override": 30, "max_model_len": 256},
    "preempted, depth 2": {"num_gpu_blocks_override": 30, "max_model_len": 256, "async_scheduling": True},
    "preempted, chunks of 7": {
        "num_gpu_blocks_override": 30, "max_model_len": 256, "long_prefill_token_threshold": 7,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM) -> dict[str, list[list[list[int]]]]:
    """What each prompt gives by itself, greedily and sampled."""
    llm = make_llm(max_num_seqs=1, enable_prefix_caching=False)
    return {
        name: tokens_of([llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, all_params, strict=True)])
        for name, all_params in {"greedy": [greedy()] * len(PROMPTS), "sampled": sampled()}.items()
    }


def sampled() -> list[SamplingParams]:
    """Very different requests; a seed each."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ]
    return [
        SamplingParams(seed=100 + index, max_tokens=24, ignore_eos=True, **kinds[index % 4])
        for index in range(len(PROMPTS))
    ]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_prompt_alone(way: str, make_llm: MakeLLM, alone: dict[str, Any]) -> None:
    llm = make_llm(**WAYS[way])
    assert tokens_of(llm.generate(PROMPTS, greedy())) == alone["greedy"]
    assert tokens_of(llm.generate(PROMPTS, sampled())) == alone["sampled"]
    if way.startswith("preempted"):
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if not isinstance(metric, Histogram)}
        assert metrics["octavo:num_preemptions"] > 0, "the pool is too large for this test to mean anything"
    llm._frontend.client.call("check_books")


@pytest.mark.parametrize("depth_2", [False, True])
def test_prefix_hits_change_nothing(make_llm: MakeLLM, alone: dict[str, Any], depth_2: bool) -> None:
    llm = make_llm(async_scheduling=depth_2)
    assert llm.reset_prefix_cache()
    first = llm.generate(PROMPTS, greedy())
    again = llm.generate(PROMPTS, greedy())
    assert tokens_of(first) == tokens_of(again) == alone["greedy"]
    # The last token is always computed: a hit covers whole blocks before it.
    assert [output.num_cached_tokens for output in again] == [(len(prompt) - 1) // 16 * 16 for prompt in PROMPTS]
    assert llm.reset_prefix_cache()
    longer = [prompt + [5, 6, 7] for prompt in PROMPTS]
    llm.generate(PROMPTS, greedy(1))
    with_hits = llm.generate(longer, greedy())
    assert sum(output.num_cached_tokens or 0 for output in with_hits) > 0
    assert llm.reset_prefix_cache()
    assert tokens_of(with_hits) == tokens_of(llm.generate(longer, greedy()))


def test_a_cache_salt_keeps_prefixes_apart(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = PROMPTS[0] * 3
    salted = {"prompt_token_ids": prompt, "cache_salt": "tenant a"}
    plain = llm.generate(prompt, greedy(4))[0]
    assert llm.generate(salted, greedy(4))[0].num_cached_tokens == 0
    again = llm.generate(salted, greedy(4))[0]
    assert again.num_cached_tokens and again.outputs[0].token_ids == plain.outputs[0].token_ids


def test_n_answers_are_those_of_any_batch_and_differ(make_llm: MakeLLM) -> None:
    params = SamplingParams(n=4, seed=7, temperature=1.0, max_tokens=20, ignore_eos=True)
    llm = make_llm()
    (by_itself,) = tokens_of(llm.generate(PROMPTS[0], params))
    in_batch = tokens_of(llm.generate([*PROMPTS[1:4], PROMPTS[0]], [greedy(), greedy(), greedy(), params]))[-1]
    assert by_itself == in_batch
    assert len({tuple(answer) for answer in by_itself}) == 4
    (preempted,) = tokens_of(make_llm(num_gpu_blocks_override=30, max_model_len=256).generate(PROMPTS[0], params))
    assert preempted == by_itself


def test_unseeded_requests_repeat_with_the_engine_seed_only(make_llm: MakeLLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    runs = [
        tokens_of(make_llm(seed=0, max_num_seqs=number, in_process=True).generate([PROMPTS[1]] * 2, params))
        for number in (5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("settings", [{"long_prefill_token_threshold": 7}, {"async_scheduling": True}], ids=str)
def test_logprobs_do_not_depend_on_chunks(settings: dict[str, Any], make_llm: MakeLLM) -> None:
    params = greedy(8, logprobs=3, prompt_logprobs=2)
    whole = make_llm().generate(PROMPTS[:6], params)
    cut = make_llm(**settings).generate(PROMPTS[:6], params)
    for one, other, prompt in zip(whole, cut, PROMPTS, strict=False):
        assert one.prompt_logprobs is not None and other.prompt_logprobs is not None
        assert len(one.prompt_logprobs) == len(prompt) and one.prompt_logprobs[0] is None
        positions = [*zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)]
        positions += zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True)
        assert len(positions) == len(prompt) - 1 + 8
        for mine, theirs in positions:
            assert mine is not None and theirs is not None
            assert mine.keys() == theirs.keys()
            for token_id in mine:
                assert mine[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)
                assert mine[token_id].rank == theirs[token_id].rank


@pytest.mark.parametrize("in_process", [True, False], ids=["thread", "process"])
def test_streams_join_to_what_generate_returns(tiny_model: Any, alone: dict[str, Any], in_process: bool) -> None:
    args = EngineArgs(
        model=str(tiny_model), load_format="dummy", dtype="float32", skip_tokenizer_init=True, num_threads=1,
        num_gpu_blocks_override=600,
    )  # fmt: skip

    async def stream(engine: AsyncLLM, index: int, kind: RequestOutputKind) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, output_kind=kind)
        token_ids: list[int] = []
        async for output in engine.generate(PROMPTS[index], params):
            new = output.outputs[0].token_ids
            token_ids = token_ids + new if kind is RequestOutputKind.DELTA else new
        return token_ids

    async def run() -> list[list[int]]:
        kinds = list(RequestOutputKind)
        async with AsyncLLM.from_engine_args(args, in_process=in_process) as engine:
            jobs = [stream(engine, index, kinds[index % 3]) for index in range(len(PROMPTS))]
            return await asyncio.gather(*jobs)

    assert asyncio.run(run()) == [answers[0] for answers in alone["greedy"]]

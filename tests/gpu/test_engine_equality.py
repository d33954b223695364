"""The same tokens on a GPU, whatever else happens: recorded or launched one by one, alone or batched, in chunks, from
cached prefixes, preempted, one or two steps ahead. In float32, against the CPU engine (which is tested against
transformers) and against transformers itself where it is installed. A wrong slot, row, position, buffer that is
overwritten too early, or graph that is recorded over moving memory changes tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import SamplingParams
from tests.gpu.conftest import MODELS, MakeLLM, greedy, random_prompts, tokens_of

PROMPTS = random_prompts(16)
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {},
    "graphs, depth 1": {"async_scheduling": False},
    "eager, depth 1": {"enforce_eager": True, "async_scheduling": False},
    "one at a time": {"max_num_seqs": 1},
    "chunks of 7": {"long_prefill_token_threshold": 7},
    "steps of 64 tokens": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
    "blocks of 16": {"block_size": 16, "num_gpu_blocks_override": 900},
    "preempted": {"block_size": 16, "num_gpu_blocks_override": 30, "max_model_len": 256},
    "another process": {"in_process": False},
}


@pytest.fixture(scope="module")
def on_cpu(make_llm: MakeLLM) -> dict[str, list[list[list[int]]]]:
    """What the CPU engine says."""
    found = {}
    for model in MODELS:
        llm = make_llm(model, device="cpu", block_size=16, num_gpu_blocks_override=900)
        found[model] = tokens_of(llm.generate(PROMPTS, greedy()))
    return found


def sampled(count: int) -> list[SamplingParams]:
    """Very different requests; a seed each."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.0},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ]
    return [
        SamplingParams(seed=100 + index, max_tokens=24, ignore_eos=True, **kinds[index % len(kinds)])
        for index in range(count)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_the_cpu_engines(way: str, model: str, make_llm: MakeLLM, on_cpu: dict[str, Any]) -> None:
    llm = make_llm(model, **WAYS[way])
    assert tokens_of(llm.generate(PROMPTS, greedy())) == on_cpu[model]
    assert tokens_of(llm.generate(PROMPTS, greedy())) == on_cpu[model]  # from cached prefixes
    llm._frontend.client.call("check_books")


@pytest.mark.parametrize("params", ["plain", "filtered", "mixed"])
def test_sampled_tokens_do_not_depend_on_the_way(params: str, make_llm: MakeLLM) -> None:
    chosen = {
        "plain": [SamplingParams(seed=i, temperature=0.8, max_tokens=24, ignore_eos=True) for i in range(16)],
        "filtered": [
            SamplingParams(seed=i, temperature=0.8, top_p=0.9, top_k=40, max_tokens=24, ignore_eos=True)
            for i in range(16)
        ],
        "mixed": sampled(16),
    }[params]
    expected = tokens_of(make_llm(enforce_eager=True, async_scheduling=False).generate(PROMPTS, chosen))
    for way in ({}, {"max_num_seqs": 1}, {"enforce_eager": True}, {"long_prefill_token_threshold": 7}):
        assert tokens_of(make_llm(**way).generate(PROMPTS, chosen)) == expected, way


def test_logprobs_are_the_same_recorded_or_not(make_llm: MakeLLM) -> None:
    params = greedy(12, logprobs=3, prompt_logprobs=2)
    eager = make_llm(enforce_eager=True).generate(PROMPTS, params)
    graphs = make_llm().generate(PROMPTS, params)
    assert tokens_of(eager) == tokens_of(graphs)
    for one, other in zip(eager, graphs, strict=True):
        assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_transformers(model: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from octavo import LLM

    config = transformers.AutoConfig.for_model(
        **{key: value for key, value in MODELS[model].items() if key not in ("architectures", "torch_dtype")}
    )
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    for parameter in reference.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    reference = reference.cuda()
    llm = LLM(
        str(tmp_path), dtype="float32", device="cuda", skip_tokenizer_init=True, num_gpu_blocks_override=300,
        in_process=True,
    )  # fmt: skip
    got = tokens_of(llm.generate(PROMPTS, greedy(16)))
    llm.close()
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        # Not generate(): it would keep the end of sequence from being chosen, and the requests here only ignore it.
        ids = torch.tensor([prompt + tokens[0]], device="cuda")
        with torch.inference_mode():
            best = reference(ids).logits[0].argmax(-1)
        assert tokens[0] == best[len(prompt) - 1 : -1].tolist()

"""Beam search against transformers where both define it alike, and against its definition in a few lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams
from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.frontend.beam_search import BeamSearch
from octavo.outputs import Logprob
from tests.engine.conftest import TINY_CONFIG, random_prompts

EOS = 2
CONTEXT = 64
PROMPTS = random_prompts(3, seed=5, longest=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LLM]]:
    """A tiny Llama in transformers and here; weights large enough that some tokens are far likelier than others."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY_CONFIG, "initializer_range": 0.25})
    reference = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny-beams")
    reference.save_pretrained(folder)
    with LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, num_threads=1, max_model_len=CONTEXT,
        num_gpu_blocks_override=200,
    ) as llm:  # fmt: skip
        yield reference, llm


def search(llm: LLM, prompts: Any, **params: Any) -> list[list[tuple[list[int], float]]]:
    """Tokens and sums of the sequences found for each prompt."""
    outputs = llm.beam_search(prompts, BeamSearchParams(**params))
    return [[(each.tokens, each.cum_logprob) for each in output.sequences] for output in outputs]


@pytest.mark.parametrize(("width", "max_tokens"), [(1, 6), (2, 12), (5, 20)])
def test_without_an_end_it_finds_what_transformers_finds(model: tuple[Any, LLM], width: int, max_tokens: int) -> None:
    """All sequences are of one length, so that no definition of penalties matters."""
    import torch

    reference, llm = model
    found = search(llm, PROMPTS, beam_width=width, max_tokens=max_tokens, ignore_eos=True)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0, length_penalty=0.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert [tokens for tokens, _ in ours] == theirs.sequences.tolist()
        if width > 1:
            assert [total for _, total in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-3)


@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.0, 3.0])
@pytest.mark.parametrize("keeps_end", [False, True])
def test_ends_and_penalties(model: tuple[Any, LLM], penalty: float, keeps_end: bool) -> None:
    reference, llm = model
    found = search(
        llm, PROMPTS, beam_width=6, max_tokens=8, length_penalty=penalty, include_stop_str_in_output=keeps_end
    )
    num_ended = 0
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = by_definition(reference, prompt, 6, 8, penalty)
        num_ended += sum(tokens[-1] == EOS for tokens, _ in theirs)
        shown = [tokens[:-1] if tokens[-1] == EOS and not keeps_end else tokens for tokens, _ in theirs]
        assert [tokens for tokens, _ in ours] == shown
        assert [total for _, total in ours] == pytest.approx([total for _, total in theirs], abs=1e-3)
    assert num_ended or penalty > 1, "no sequence ends, so that nothing is shown"


def by_definition(
    reference: Any, prompt: list[int], width: int, max_tokens: int, penalty: float
) -> list[tuple[list[int], float]]:
    """As vLLM defines it, to the full length, over all logits of transformers."""
    import torch

    running, done = [(prompt, 0.0)], list[tuple[list[int], float]]()
    for _ in range(max_tokens):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens for tokens, _ in running])).logits[:, -1]
        top = torch.log_softmax(logits, -1).topk(2 * width)
        grown = [
            ([*tokens, token_id], total + logprob)
            for (tokens, total), ids, values in zip(running, top.indices.tolist(), top.values.tolist(), strict=True)
            for token_id, logprob in zip(ids, values, strict=True)
        ]
        done += [each for each in grown if each[0][-1] == EOS]
        running = sorted((each for each in grown if each[0][-1] != EOS), key=lambda each: -each[1])[:width]

    def score(each: tuple[list[int], float]) -> float:
        return each[1] / (len(each[0]) - (each[0][-1] == EOS)) ** penalty

    return sorted([*done, *running], key=score, reverse=True)[:width]


def test_prompts_do_not_mix_and_the_context_ends_a_search(model: tuple[Any, LLM]) -> None:
    _, llm = model
    prompts = [*PROMPTS, list(range(3, 3 + CONTEXT - 2))]
    params = {"beam_width": 3, "max_tokens": 5, "ignore_eos": True}
    together = search(llm, prompts, **params)
    limited = llm.beam_search(prompts, BeamSearchParams(**params), concurrency_limit=2)
    assert [[each.tokens for each in output.sequences] for output in limited] == [
        [tokens for tokens, _ in each] for each in together
    ]
    assert [len(each[0][0]) for each in together] == [*(len(prompt) + 5 for prompt in PROMPTS), CONTEXT]
    assert {each.finish_reason for output in limited for each in output.sequences} == {"length"}
    assert all(each.text is None and len(each.logprobs) in (2, 5) for output in limited for each in output.sequences)
    assert [output.sequences[0].orig_prompt for output in limited] == prompts


def test_bad_parameters_are_named_before_anything_runs(model: tuple[Any, LLM]) -> None:
    _, llm = model
    for given, param in (
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": True}, "beam_width"),
        ({"beam_width": 11}, "beam_width"),  # 22 logprobs, of which 20 are allowed
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0.5}, "temperature"),  # would change nothing
    ):
        with pytest.raises(InvalidRequestError) as caught:
            search(llm, PROMPTS, **{"beam_width": 2, "max_tokens": 4, **given})
        assert caught.value.param == param
    with pytest.raises(ContextLengthError):
        search(llm, [PROMPTS[0], [5] * CONTEXT], beam_width=2, max_tokens=4)


def test_a_search_ends_when_it_is_decided() -> None:
    beams = BeamSearch([1], BeamSearchParams(2, 1000, length_penalty=0.0), [EOS], 5000)
    beams.advance([{EOS: Logprob(-0.1), 7: Logprob(-3.0), 8: Logprob(-4.0), 9: Logprob(-5.0)}])
    assert [beam.tokens for beam in beams.running] == [[1, 7], [1, 8]], "one answer is not two"
    beams.advance([{EOS: Logprob(-0.2), 7: Logprob(-3.0)}, {EOS: Logprob(-1.0), 7: Logprob(-0.5)}])
    assert not beams.running
    assert [(beam.tokens, beam.finish_reason) for beam in beams.best()] == [([1], "stop"), ([1, 7], "stop")]

"""The batched sampler against the plain one in ``oracle.py``. Turns red when a filter, penalty or mask changes its
meaning or order, when a row's result depends on its neighbours, or when the draw is not the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.sampling.candidates import most_likely_ref
from octavo.kernels.sampling.draw import draw_ref
from octavo.kernels.sampling.filters import NUM_CANDIDATES, FilterColumns, draw_narrow_ref, kept_threshold_ref
from octavo.messages import ResolvedSampling
from octavo.sampling.sampler import NO_TOKEN_MESSAGE
from tests.unit.sampling.harness import Bench, sampling
from tests.unit.sampling.oracle import distribution, draw, masked, splitmix

VOCAB = 300  # not a multiple of the block of the draw

tokens = st.integers(0, VOCAB - 1)
texts = st.lists(st.integers(0, 12), min_size=1, max_size=20)
parameters = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 50, VOCAB, 10 * VOCAB]),
        "top_p": st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.9999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 1.7]),
        "min_tokens": st.sampled_from([0, 0, 3, 30]),
        "eos_token_ids": st.lists(tokens, max_size=2),
        "stop_token_ids": st.lists(tokens, max_size=2),
        "logit_bias": st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4),
        "allowed_token_ids": st.one_of(st.just([]), st.lists(tokens, min_size=8, max_size=200, unique=True)),
        "bad_words_token_ids": st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), max_size=3),
    }
)


def is_borderline(x: np.ndarray, s: ResolvedSampling) -> bool:
    """A float32 rounding may move a token over the border of a filter; such examples prove nothing."""
    exact = distribution(x, s)
    wider = ResolvedSampling(
        **{
            **{name: getattr(s, name) for name in s.__struct_fields__},
            "top_p": min(1.0, s.top_p * (1 + 1e-5)),
            "min_p": s.min_p * (1 - 1e-5),
        }
    )
    narrower = ResolvedSampling(
        **{
            **{name: getattr(s, name) for name in s.__struct_fields__},
            "top_p": s.top_p * (1 - 1e-5),
            "min_p": s.min_p,
        }
    )
    return any(((distribution(x, other) > 0) != (exact > 0)).any() for other in (wider, narrower))


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(parameters, texts, st.lists(st.integers(0, 12), max_size=12)), min_size=1, max_size=6),
    scale=st.sampled_from([0.1, 3.0, 12.0]),
    number=st.integers(0, 2**31),
)
def test_agrees_with_the_plain_sampler(
    rows: list[tuple[dict, list[int], list[int]]], scale: float, number: int
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(number)) * scale
    bench = Bench(VOCAB)
    order = list(range(15, 15 - len(rows), -1))
    for row, (fields, prompt, output) in zip(order, rows, strict=True):
        bench.add(row, sampling(**fields), prompt, output)
    drawn = bench.sample(logits, order)
    for i, (fields, prompt, output) in enumerate(rows):
        s = sampling(**fields)
        x = masked(logits[i].numpy(), s, prompt, output)
        token = int(drawn.token_ids[i])
        if not np.isfinite(x).any():
            assert token == -1
        elif s.temperature == 0:
            assert x[token] >= x.max() - 1e-4
        elif not is_borderline(x, s):
            expected, distance = draw(distribution(x, s), splitmix(s.seed, len(output)))
            assert distance < 1e-5 or token == expected


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(parameters, texts), min_size=2, max_size=8), number=st.integers(0, 2**31))
def test_a_row_does_not_see_its_neighbours(rows: list[tuple[dict, list[int]]], number: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(number)) * 4
    bench = Bench(VOCAB)
    for row, (fields, prompt) in enumerate(rows):
        bench.add(row, sampling(**fields), prompt)
    together = bench.sample(logits, list(range(len(rows)))).token_ids
    alone = [int(bench.sample(logits[i : i + 1], [i]).token_ids) for i in range(len(rows))]
    assert together.tolist() == alone


def test_draws_follow_the_distribution() -> None:
    # Chi-square over 40,000 draws of one request at successive positions, 19 degrees of freedom: the 99.99 % point is
    # 52. A generator with correlated neighbours, or a biased inversion, lands far above.
    vocab, count = 20, 40_000
    logits = torch.linspace(-1.5, 1.5, vocab)
    bench = Bench(vocab)
    bench.add(0, sampling(temperature=1.0, seed=42), [0])
    rows = np.zeros(1000, np.int64)
    drawn = torch.cat(
        [
            bench.sampler.sample(
                logits.repeat(1000, 1), rows, torch.arange(start, start + 1000) + 1, start + 1001, None
            ).token_ids
            for start in range(0, count, 1000)
        ]
    )
    observed = np.bincount(drawn.numpy(), minlength=vocab)
    expected = logits.softmax(0).double().numpy() * count
    assert ((observed - expected) ** 2 / expected).sum() < 52
    # And across seeds at the first position: neighbouring seeds are unrelated.
    bench = Bench(vocab)
    observed = np.zeros(vocab)
    for first in range(0, 4000, 16):
        for row in range(16):
            if first:
                bench.sampler.remove(row)
            bench.add(row, sampling(temperature=1.0, seed=first + row), [0])
        observed += np.bincount(bench.sample(logits.repeat(16, 1), list(range(16))).token_ids, minlength=vocab)
    expected = expected / count * 4000
    assert ((observed - expected) ** 2 / expected).sum() < 52


def test_tail_tokens_keep_their_share() -> None:
    # 200,000 tokens of 1e-7 each around one of 0.98: a float32 cumulative sum near 1 would lose or double them.
    weight = torch.full((1, 200_001), 1e-7)
    weight[0, 100_000] = 0.98
    for first, low in ((0, 0.0), (100_001, 0.99)):
        u = low + 0.01 * (torch.arange(40).double() + 0.5) / 40
        drawn = draw_ref(weight.expand(40, -1), u)
        expected = first + (torch.arange(40) + 0.5) / 40 * 100_000
        assert (drawn - expected).abs().max() < 20  # float32 does not hold 1e-7 and 0.98 exactly


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-52, 0.5])
def test_a_token_without_weight_is_never_drawn(u: float) -> None:
    for size in (1, 127, 128, 129, 1000):
        for position in {0, size // 2, size - 1}:
            weight = torch.zeros(1, size)
            weight[0, position] = 1e-30
            assert draw_ref(weight, torch.tensor([u], dtype=torch.float64)).tolist() == [position]


def test_the_same_text_comes_again_after_a_preemption() -> None:
    # Penalties, bad words, thinking budget and draw continue from a text that is given back whole.
    params = sampling(
        temperature=1.2, seed=3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, top_p=0.9,
        bad_words_token_ids=[[4, 5], [7]], min_tokens=6, eos_token_ids=[1, 2],
        thinking_token_budget=5, think_start_token_id=10, think_end_token_id=11, logit_bias={10: 3.0},
    )  # fmt: skip
    vocab, prompt, steps = 16, [10, 4, 3], 30
    logits = torch.randn(steps, vocab, generator=torch.Generator().manual_seed(0)) * 2

    def run(preempted_at: set[int]) -> list[int]:
        bench, text, row = Bench(vocab), list[int](), 0
        bench.add(row, params, prompt)
        for step in range(steps):
            if step in preempted_at:
                bench.sampler.remove(row)
                row += 1
                bench.add(row, params, prompt, text)
            token = bench.sample(logits[step : step + 1], [row]).token_ids
            bench.append([row], token)
            text += token.tolist()
        return text

    straight = run(set())
    assert run({1, 2, 6, 17, 29}) == straight
    assert 11 in straight[:6]


@pytest.mark.parametrize(
    ("prompt", "budget", "expected_end"),
    [([3], 4, 5), ([9], 4, 4), ([9, 5, 8, 3], 2, 3), ([9, 3, 3, 3], 2, 2), ([3], 0, 1), ([3], -1, None)],
    ids=["opened by output", "open at the end", "closed in the prompt", "open in the prompt", "zero", "none"],
)
def test_thinking_ends_when_its_budget_is_spent(prompt: list[int], budget: int, expected_end: int | None) -> None:
    # Token 9 opens (the model wants it first, then always 3), token 8 closes.
    bench = Bench(12)
    bench.add(0, sampling(thinking_token_budget=budget, think_start_token_id=9, think_end_token_id=8), prompt)
    text: list[int] = []
    for step in range(10):
        logits = torch.zeros(1, 12)
        logits[0, 9 if step == 0 and 9 not in prompt[-4:] or step == 0 and 8 in prompt else 3] = 5
        token = bench.sample(logits, [0]).token_ids
        bench.append([0], token)
        text += token.tolist()
    assert (text.index(8) if 8 in text else None) == expected_end


@pytest.mark.parametrize(
    ("output", "is_banned"),
    [([4, 5], True), ([1, 4, 5], True), ([5], False), ([4], False), ([4, 5, 1], False), ([], False)],
)
def test_a_word_of_several_tokens_is_stopped_at_its_last(output: list[int], is_banned: bool) -> None:
    # The prompt ends in the word's first tokens: what the user wrote is not the model's word.
    bench = Bench(12)
    bench.add(0, sampling(bad_words_token_ids=[[4, 5, 6], [9, 9, 9, 9, 9, 9], [2, 7]]), [4, 5, 4], output)
    logits = torch.zeros(1, 12)
    logits[0, 6], logits[0, 3] = 5, 4
    assert bench.sample(logits, [0]).token_ids.tolist() == [3 if is_banned else 6]


def test_a_word_begun_in_the_prompt_is_not_stopped() -> None:
    bench = Bench(12)
    bench.add(0, sampling(bad_words_token_ids=[[4, 5, 6]]), [4, 5])
    bench.add(1, sampling(bad_words_token_ids=[[4, 5, 6]]), [4], [5])
    logits = torch.zeros(2, 12)
    logits[:, 6] = 5
    assert bench.sample(logits, [0, 1]).token_ids.tolist() == [6, 6]


def test_grammar_bits_rule_tokens_out() -> None:
    vocab = 70
    bench = Bench(vocab)
    bench.add(0, sampling(), [1])
    bench.add(1, sampling(temperature=1.0), [1])
    mask = torch.zeros(2, 3, dtype=torch.int32)
    mask[0, 2] = 1 << 5  # token 69
    mask[1, 0] = -(2**31)  # token 31: the sign bit
    logits = torch.randn(2, vocab)
    assert bench.sample(logits, [0, 1], mask).token_ids.tolist() == [69, 31]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("neighbour", [0.0, 1.0])
def test_broken_logits_fail_their_row_alone(temperature: float, neighbour: float) -> None:
    bench = Bench(VOCAB)
    bench.add(0, sampling(temperature=temperature, top_p=0.9), [1])
    bench.add(1, sampling(temperature=neighbour), [1])
    bench.add(2, sampling(temperature=temperature, allowed_token_ids=[5], bad_words_token_ids=[[5]]), [1])
    logits = torch.randn(3, VOCAB)
    logits[0, 7] = torch.nan
    drawn = bench.sample(logits, [0, 1, 2])
    assert drawn.token_ids[0] == -1
    assert drawn.token_ids[1] >= 0
    assert drawn.token_ids[2] == -1
    assert "NaN" in NO_TOKEN_MESSAGE


def test_the_input_of_another_dtype_is_left_alone_and_gives_the_same() -> None:
    bench = Bench(VOCAB)
    bench.add(0, sampling(temperature=0.7, top_k=9, repetition_penalty=1.4), [1, 2, 3])
    logits = torch.randn(1, VOCAB).bfloat16()
    before = logits.clone()
    low = bench.sampler.sample(logits, np.array([0]), torch.tensor([3]), 3, None).token_ids
    assert torch.equal(logits, before)
    assert torch.equal(low, bench.sample(logits.float(), [0]).token_ids)


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, 0.0, 1.0)])
def test_logprobs(mode: str, temperatures: tuple[float, ...]) -> None:
    bench = Bench(VOCAB, mode)
    wanted = [
        sampling(temperature=temperatures[0], logprobs=3, top_k=4, logit_bias={5: 2.0}),
        sampling(temperature=temperatures[1], logprobs=-1, logprob_token_ids=[9, 11]),
        sampling(temperature=temperatures[2], logprob_token_ids=[0]),
    ]
    for row, params in enumerate(wanted):
        bench.add(row, params, [1])
    bench.add(3, sampling(), [1])
    logits = torch.randn(4, VOCAB) * 2
    drawn = bench.sample(logits, [0, 3, 1, 2][:4])
    found = drawn.logprobs
    assert found is not None
    assert found.request.positions == [0, 2, 3]
    for k, (params, i) in enumerate(zip(wanted, found.request.positions, strict=True)):
        x = logits[i].double()
        if mode.startswith("processed"):
            for token, bias in params.logit_bias.items():
                x[token] += bias
            if params.temperature:
                x = x / params.temperature
                if params.top_k:
                    x[x < x.sort(descending=True).values[params.top_k - 1]] = -torch.inf
        values = x.log_softmax(0) if mode.endswith("logprobs") else x
        num_top = found.request.num_top[k]
        ids, shown = found.token_ids[k], found.values[k]
        assert ids[0] == drawn.token_ids[i]
        torch.testing.assert_close(shown.double(), values[ids], atol=1e-4, rtol=1e-4)
        assert num_top == {3: 3, -1: VOCAB, None: 0}[params.logprobs]
        torch.testing.assert_close(
            shown[1 : 1 + num_top].double(), values.sort(descending=True).values[:num_top], atol=1e-4, rtol=1e-4
        )
        named = ids[found.token_ids.shape[1] - 2 :][: len(params.logprob_token_ids)]
        assert named.tolist() == params.logprob_token_ids
        assert found.ranks[k] == 1 + int((values > values[ids[0]]).sum())


def test_a_batch_without_features_gathers_nothing() -> None:
    # "A feature costs nothing where no row asks for it": all optional parts of the gathered batch are absent.
    bench = Bench(VOCAB)
    for row in range(4):
        bench.add(row, sampling(), [1])
    batch = bench.sampler._parameters.gather(np.arange(4))
    parts = ("filters", "penalties", "allowed", "bias", "min_tokens", "bad_words", "thinking", "logprobs")
    assert [getattr(batch, part) for part in parts] == [None] * len(parts)
    assert batch.num_random == 0


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [40, 64, 300, 5000])
def test_narrow_and_wide_sets_are_drawn_alike(scale: float, vocab: int) -> None:
    # The short cut over the 64 most likely tokens gives what the full vocabulary gives, ties in bfloat16 included, and
    # is taken for the sets that fit.
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(64, vocab, generator=generator) * scale).bfloat16().float()
    number = torch.rand(64, generator=generator).double()
    for top_k, top_p, min_p in (
        (0, 0.3, 0.0),
        (0, 0.95, 0.0),
        (5, 1.0, 0.0),
        (50, 0.9, 0.0),
        (200, 0.9, 0.1),
        (9, 0.5, 0.2),
    ):
        columns = FilterColumns(
            log_min_p=torch.full((64,), min_p).log() if min_p else None,
            top_k=torch.full((64,), min(top_k, vocab)) if top_k else None,
            max_top_k=min(top_k, vocab),
            top_p=torch.full((64,), top_p, dtype=torch.float64) if top_p < 1 else None,
        )
        threshold = kept_threshold_ref(logits, columns).unsqueeze(1)
        kept = torch.where(logits >= threshold, logits, -torch.inf).double().softmax(1)
        cdf = kept.cumsum(1)
        expected = torch.searchsorted(cdf, number.unsqueeze(1), right=True).squeeze(1)
        is_clear = (cdf - number.unsqueeze(1)).abs().amin(1) > 1e-6
        narrow, is_complete = draw_narrow_ref(logits, columns, number)
        assert torch.equal(narrow[is_complete & is_clear], expected[is_complete & is_clear])
        fits = (kept > 0).sum(1) < min(NUM_CANDIDATES, vocab)
        if min_p == 0:
            assert bool(is_complete[fits].all())
        s, row = sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p), logits[0].double().numpy()
        if not is_borderline(row, s):
            assert ((kept[0] > 0).numpy() == (distribution(row, s) > 0)).all()


@pytest.mark.parametrize("vocab", [1, 127, 128, 1000])
def test_the_most_likely_token_is_the_first_of_the_largest(vocab: int) -> None:
    logits = torch.randint(0, 4, (50, vocab), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(most_likely_ref(logits), logits.argmax(1))
    logits[0, vocab // 2] = torch.nan
    logits[1] = -torch.inf
    assert most_likely_ref(logits)[:2].tolist() == [-1, -1]

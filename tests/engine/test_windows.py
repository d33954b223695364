"""Layers with windows, alone and beside layers without: the same tokens whatever the cache does.

Prompts are several windows long. Red when a block is given back that a later token still sees (it is overwritten then,
and tokens change), when one is kept that nobody sees (the small pools below would not do), or when a prefix hit lacks
what some group needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from tests.engine.conftest import MakeLLM, greedy, tokens_of
from tests.models.families import make_reference

NUM_GROUPS = {"mistral-window": (0, 1), "gemma2": (1, 2), "gemma3": (1, 6)}
"""Model to KV groups without and with a window: its layers, cut to the size that wastes least."""
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunks of 7": {"long_prefill_token_threshold": 7},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
    "blocks of 64": {"block_size": 64, "num_gpu_blocks_override": 150},
    "depth 2": {"async_scheduling": True},
    "torch": {"attention_backend": "TORCH_SDPA"},
}


def prompts() -> list[list[int]]:
    """Eight, two of which share a beginning of 100 tokens."""
    rng = random.Random(5)
    made = [[rng.randrange(3, 77) for _ in range(length)] for length in (1, 17, 40, 90, 130, 160, 176, 150)]
    made[7][:100] = made[6][:100]
    return made


PROMPTS = prompts()


@pytest.fixture(scope="module", params=NUM_GROUPS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_reference(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(model: Path) -> Iterator[MakeLLM]:
    """Start the model with some settings; one engine per set of settings."""
    made: dict[str, LLM] = {}

    def start(**settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(
                str(model),
                **{
                    "dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1, "block_size": 16,
                    "num_gpu_blocks_override": 500, "max_model_len": 208, "max_num_seqs": 8, "in_process": True,
                    **settings,
                },
            )  # fmt: skip
        return made[key]

    yield start
    for llm in made.values():
        llm.close()


@pytest.fixture(scope="module")
def alone(make: MakeLLM) -> list[list[list[int]]]:
    """What each prompt gives by itself."""
    llm = make(max_num_seqs=1, enable_prefix_caching=False)
    return tokens_of([llm.generate(prompt, greedy(12))[0] for prompt in PROMPTS])


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_prompt_alone(way: str, make: MakeLLM, alone: list[list[list[int]]]) -> None:
    llm = make(**WAYS[way])
    assert tokens_of(llm.generate(PROMPTS, greedy(12))) == alone
    again = llm.generate(PROMPTS, greedy(12))
    assert tokens_of(again) == alone
    assert any(output.num_cached_tokens for output in again)
    llm._frontend.client.call("check_books")


def test_a_pool_of_little_more_than_one_request(make: MakeLLM, model: Path, alone: list[list[list[int]]]) -> None:
    """All eight must take turns in it, and find prefixes that others have half overwritten."""
    num_full, num_local = NUM_GROUPS[model.name[:-1]]
    # 208 tokens are 13 blocks. A window of 24 lies in 3 at most, and one more is being filled.
    llm = make(num_gpu_blocks_override=1 + 13 * num_full + 4 * num_local, max_num_batched_tokens=16)
    for _ in range(2):
        assert tokens_of(llm.generate(PROMPTS, greedy(12))) == alone
        llm._frontend.client.call("check_books")


def test_flex_attention(make: MakeLLM, alone: list[list[list[int]]], model: Path) -> None:
    """A row's table still lists blocks that were given back, and may be its own again under another number."""
    if not model.name.startswith("mistral"):
        pytest.skip("one model will do: every score is computed before it is masked")
    llm = make(attention_backend="FLEX_ATTENTION", max_num_seqs=2, num_gpu_blocks_override=40)
    got = tokens_of(llm.generate([PROMPTS[3], PROMPTS[0], PROMPTS[2]], greedy(5)))
    assert got == [[alone[index][0][:5]] for index in (3, 0, 2)]


def test_another_process(make: MakeLLM, alone: list[list[list[int]]], model: Path) -> None:
    if not model.name.startswith("gemma3"):
        pytest.skip("one model will do: the one with seven tables per request")
    assert tokens_of(make(in_process=False).generate(PROMPTS, greedy(12))) == alone


def test_a_shared_beginning_is_found_by_all_groups(make: MakeLLM, alone: list[list[list[int]]]) -> None:
    llm = make()
    assert llm.reset_prefix_cache()
    llm.generate(PROMPTS[6], greedy(12))
    (output,) = llm.generate(PROMPTS[7], greedy(12))
    # 100 tokens are 6 full blocks: all groups still have what the token behind them sees.
    assert output.num_cached_tokens == 96
    assert tokens_of([output]) == [alone[7]]

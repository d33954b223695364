"""One variant of each family on a GPU, against transformers: in float32 token by token, in bfloat16 within bounds.

Red when a GPU kernel (norm, activation, rotation, cache write, attention, recorded step) treats what a family brings
differently from the CPU path: weights around 0, norms behind blocks, partial or no rotation, windows, soft-caps.
Families with experts are in ``tests/models/families.py`` too and run here with the others.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from octavo import LLM, RequestOutput, SamplingParams
from tests.models.families import VARIANTS, make_reference

NAMES = [name for name, variant in VARIANTS.items() if variant.is_on_gpu]
FLOAT32_TOLERANCE = 2e-3
"""Of a logit, whose sizes are up to 6: products may run in another order, not in TF32."""
BFLOAT16_ERROR = 1.5
"""Our mean distance from float32, beside that of transformers' own bfloat16."""
BFLOAT16_FLOOR = 5e-4
"""Mean distance that is never too much."""
NUM_TOKENS = 24
WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 8}
"""Heads of 32 and rows that kernels for GPUs take; other fields as the variant says."""


def wide_options(name: str) -> dict[str, object]:
    """``WIDE``, with what depends on it brought into line."""
    options = dict(VARIANTS[name].options)
    more: dict[str, object] = dict(WIDE)
    kv_heads = options.get("num_key_value_heads", 2)
    more["num_key_value_heads"] = 8 if kv_heads == 6 else kv_heads
    if "head_dim" in options:
        more["head_dim"] = 32
    rope = options.get("rope_parameters")
    if isinstance(rope, dict) and "long_factor" in rope:
        half = int(32 * rope.get("partial_rotary_factor", 1.0)) // 2
        factors = {"short_factor": [1.0 + i / 8 for i in range(half)], "long_factor": [2.0 + i for i in range(half)]}
        more["rope_parameters"] = {**rope, **factors}
    return more


def prompts_of(name: str) -> list[list[int]]:
    """Eight, of very different lengths, several windows long."""
    rng, variant = random.Random(0), VARIANTS[name]
    longest = variant.max_model_len - NUM_TOKENS
    lengths = [longest, variant.shortest, *(rng.randint(variant.shortest, longest) for _ in range(6))]
    return [[rng.randrange(3, 77) for _ in range(length)] for length in lengths]


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """``[T, V]`` float32 on the host."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids], device=model.device)).logits[0].float().cpu()


def prompt_logits(output: RequestOutput, vocab_size: int) -> torch.Tensor:
    """``[T - 1, V]``: all but the first position, out of the prompt's logprobs."""
    assert output.prompt_logprobs is not None
    rows = torch.empty(len(output.prompt_logprobs) - 1, vocab_size)
    for position, values in enumerate(output.prompt_logprobs[1:]):
        assert values is not None
        for token_id, value in values.items():
            rows[position, token_id] = value.logprob
    return rows


def start(folder: Path, name: str, dtype: str, device: str) -> LLM:
    """The engine as users start it, on a small cache."""
    return LLM(
        str(folder), dtype=dtype, device=device, skip_tokenizer_init=True, in_process=True, num_gpu_blocks_override=400,
        max_model_len=VARIANTS[name].max_model_len, max_num_seqs=8, max_num_batched_tokens=128, max_logprobs=-1,
        logprobs_mode="raw_logits",
    )  # fmt: skip


def check_float32(name: str, folder: Path, device: str) -> None:
    """Logits of a prompt, then greedy tokens of a batch, computed and from cached prefixes."""
    reference = make_reference(name, **wide_options(name))
    reference.save_pretrained(folder)
    reference.to(device)
    prompts = prompts_of(name)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm = start(folder, name, "float32", device)
    try:
        asking = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True)
        expected = reference_logits(reference, prompts[0])
        got = prompt_logits(llm.generate(prompts[0], asking)[0], expected.shape[1])
        assert (got - expected[:-1]).abs().max() <= FLOAT32_TOLERANCE
        first, again = llm.generate(prompts, greedy), llm.generate(prompts, greedy)
        llm._frontend.client.call("check_books")
    finally:
        llm.close()
    assert any(output.num_cached_tokens for output in again)
    for prompt, one, other in zip(prompts, first, again, strict=True):
        tokens = list(one.outputs[0].token_ids)
        assert tokens == list(other.outputs[0].token_ids)
        logits = reference_logits(reference, prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        # The largest, or as good as: which of two equals is taken depends on the order of a sum.
        assert (logits.amax(1) - chosen).max() <= FLOAT32_TOLERANCE


def check_bfloat16(name: str, folder: Path, device: str) -> tuple[float, float]:
    """Mean distance of our logits, and of transformers' in bfloat16, from float32 with the same rounded weights."""
    rounded = make_reference(name, **wide_options(name)).to(torch.bfloat16)
    rounded.save_pretrained(folder)
    exact = copy.deepcopy(rounded).float().to(device)
    rounded.to(device)
    prompts = prompts_of(name)[:4]
    asking = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True)
    llm = start(folder, name, "bfloat16", device)
    try:
        outputs = llm.generate(prompts, asking)
    finally:
        llm.close()
    ours = theirs = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_logits(exact, prompt)[:-1]
        got = prompt_logits(output, expected.shape[1])
        ours += float((got - expected).abs().mean()) / len(prompts)
        theirs += float((reference_logits(rounded, prompt)[:-1] - expected).abs().mean()) / len(prompts)
    assert ours <= BFLOAT16_ERROR * theirs + BFLOAT16_FLOOR, (ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_transformers(name: str, tmp_path: Path) -> None:
    check_float32(name, tmp_path, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_to_float32_as_transformers(name: str, tmp_path: Path) -> None:
    ours, theirs = check_bfloat16(name, tmp_path, "cuda")
    print(f"{name}: mean distance from float32 {ours:.2e}, transformers {theirs:.2e}")

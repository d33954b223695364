"""Experts as checkpoints store them: one by one or stacked, in full precision or rounded to int8.

Red when a stacked checkpoint of a family that is usually stored by experts loads otherwise, or when int8 does not reach
the experts or spoils them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from octavo import LLM, SamplingParams
from tests.models.families import make_reference

PROMPT = [5, 9, 33, 7, 12, 60, 3]


def open_llm(folder: Path, **more: Any) -> LLM:
    return LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, num_threads=1, in_process=True, max_model_len=64,
        num_gpu_blocks_override=40, max_logprobs=-1, logprobs_mode="raw_logits", **more,
    )  # fmt: skip


def last_logits(llm: LLM) -> torch.Tensor:
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, ignore_eos=True)
    (output,) = llm.generate(PROMPT, params)
    assert output.outputs[0].logprobs is not None
    values = output.outputs[0].logprobs[0]
    return torch.tensor([values[token].logprob for token in sorted(values)])


def expected_logits(reference: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return reference(input_ids=torch.tensor([PROMPT])).logits[0, -1]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_stacked_experts_of_families_that_store_them_one_by_one(name: str, tmp_path: Path) -> None:
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert any(".experts.0." in key for key in load_file(file))
    state = {key: tensor.contiguous() for key, tensor in reference.state_dict().items()}
    assert any(key.endswith(".experts.gate_up_proj") for key in state)
    save_file(state, file)
    llm = open_llm(tmp_path)
    assert (last_logits(llm) - expected_logits(reference)).abs().max() <= 1e-4
    llm.close()


def test_int8_experts_stay_near(tmp_path: Path) -> None:
    reference = make_reference("qwen3-moe")
    reference.save_pretrained(tmp_path)
    llm = open_llm(tmp_path, quantization="int8")
    expected = expected_logits(reference)
    error = ((last_logits(llm) - expected).norm() / expected.norm()).item()
    assert 0.0 < error < 0.1
    llm.close()

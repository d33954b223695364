"""One model in the layouts that checkpoints come in: the same answers from each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from octavo import LLM, SamplingParams
from tests.models.families import make_reference

torch.set_num_threads(1)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def answer(folder: Path, dtype: str) -> list[list[int]]:
    llm = LLM(
        str(folder), dtype=dtype, skip_tokenizer_init=True, num_threads=1, block_size=16, in_process=True,
        num_gpu_blocks_override=40, max_model_len=96, max_num_seqs=4,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [3 + (11 * i + start) % 70 for i in range(40)]} for start in (0, 9)]
    try:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.close()


def sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def one_bin(model: PreTrainedModel, folder: Path) -> None:
    """With the head of a tied model beside its embedding, as trainers save it."""
    whole(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def sharded_bin(model: PreTrainedModel, folder: Path) -> None:
    one_bin(model, folder)
    (folder / "pytorch_model.bin").unlink()
    state = model.state_dict()
    names, weight_map = list(state), {}
    for part in range(3):
        file = f"pytorch_model-{part + 1:05}-of-00003.bin"
        torch.save({name: state[name] for name in names[part::3]}, folder / file)
        weight_map |= dict.fromkeys(names[part::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def whole(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def head_beside_embedding(model: PreTrainedModel, folder: Path) -> None:
    """Some converters write the tied head as well; it is the embedding and is skipped."""
    whole(model, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-tied", "phi4-mini"])
def test_layouts_answer_alike(name: str, dtype: str, tmp_path: Path) -> None:
    """Llama's checkpoint is unfused, Phi's fused; both are tied."""
    model = make_reference(name).to(DTYPES[dtype])
    layouts: list[Callable[[PreTrainedModel, Path], None]] = [whole, sharded, one_bin, sharded_bin]
    if dtype == "float32":
        layouts.append(head_beside_embedding)
    answers: list[list[list[int]]] = []
    for layout in layouts:
        folder = tmp_path / layout.__name__
        layout(model, folder)
        answers.append(answer(folder, dtype))
    assert all(each == answers[0] for each in answers)
    assert len({token for row in answers[0] for token in row}) > 2

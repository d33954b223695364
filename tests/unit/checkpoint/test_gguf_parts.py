"""GGUF models in several files, as ``gguf-split`` writes them, are the same models as in one.

Red when: a part is left out or read twice; a part of another model gets in; an error does not name the missing part.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.gguf_file import GGUFFile
from octavo.checkpoint.gguf_parts import one_each
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.errors import CheckpointError
from octavo.loader.gguf import GGUFSource
from tests.unit.loader.builders import collect, request, tiny_config, write_gguf


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Twenty tensors in three files, and the whole in another folder."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", quant="Q4_1", tensors_per_part=8)
    (tmp_path / "whole").mkdir()
    write_gguf(tmp_path / "whole" / "tiny.gguf", quant="Q4_1")
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return found


def test_any_part_and_the_folder_give_the_whole(parts: list[Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "tiny.gguf"
    expected = collect(GGUFSource(request(whole)))
    config = read_model_config(locate_model(str(whole)))
    link = tmp_path / "links"
    link.mkdir()
    for index, part in enumerate(parts):  # as in the hub's cache, where blobs have no names
        os.symlink(shutil.copy(part, tmp_path / f"blob{index}"), link / part.name)
    for named in (parts[0].parent, *parts, link, link / parts[1].name):
        located = locate_model(str(named))
        assert located.format == "gguf"
        assert read_model_config(located) == config
        found = collect(GGUFSource(request(Path(located.path))))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (
            load_tokenizer_data(located.path).tokenizer.get_vocab() == load_tokenizer_data(whole).tokenizer.get_vocab()
        )


def test_the_engine_answers_alike(parts: list[Path], tmp_path: Path) -> None:
    answers: list[tuple[list[int], list[float]]] = []
    for model in (tmp_path / "whole" / "tiny.gguf", parts[0].parent):
        with LLM(str(model), dtype="float32", num_threads=1, num_gpu_blocks_override=20) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
            (output,) = llm.generate("the", params, use_tqdm=False)
        answer = output.outputs[0]
        assert answer.logprobs is not None
        logprobs = [each[token].logprob for token, each in zip(answer.token_ids, answer.logprobs, strict=True) if each]
        answers.append((list(answer.token_ids), logprobs))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    others = [part for part in parts if part != parts[missing]]
    for named in (parts[0].parent, *others):
        with pytest.raises(
            CheckpointError, match=rf"one of 3 parts, but these are not beside it: {parts[missing].name}"
        ):
            read_model_config(locate_model(str(named)))


def test_parts_that_do_not_belong_together(parts: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    shutil.copy(parts[0], alone)
    with pytest.raises(CheckpointError, match=r"one of 3 parts \(split.count\), but its name does not say so"):
        GGUFFile(alone)
    with pytest.raises(CheckpointError, match="named as part 00004 of 3"):
        GGUFFile(shutil.copy(parts[0], tmp_path / "tiny-00004-of-00003.gguf"))
    third = parts[2].read_bytes()
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="part 1 counted from 0"):
        GGUFFile(parts[0])
    parts[2].write_bytes(third)
    write_gguf(parts[2], quant="Q4_1")
    with pytest.raises(CheckpointError, match=r"one of 1 parts \(split.count\), but its name says 3"):
        GGUFFile(parts[0])
    folder = tmp_path / "fewer"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", quant="F32", tensors_per_part=7, metadata={"split.tensors.count": None})
    shutil.copy(folder / "tiny-00003-of-00003.gguf", parts[2])
    with pytest.raises(CheckpointError, match=r"(in an earlier part too|speaks of 20 tensors)"):
        GGUFFile(parts[0])


def test_models_in_a_folder_are_counted_not_files(parts: list[Path], tmp_path: Path) -> None:
    other = shutil.copy(tmp_path / "whole" / "tiny.gguf", parts[0].parent / "other.gguf")
    assert one_each(parts[0].parent.iterdir()) == [Path(other), parts[0]]


def test_strings_are_left_out_only_when_asked(parts: list[Path]) -> None:
    with GGUFFile(parts[0]) as full, GGUFFile(parts[0], strings=()) as bare:
        assert full.tensors == bare.tensors
        left_out = full.metadata.keys() - bare.metadata.keys()
        assert left_out == {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"}
        assert bare.metadata.items() <= full.metadata.items() or all(
            full.metadata[key] == value for key, value in bare.metadata.items()
        )
    assert tiny_config().vocab_size == len(full.metadata["tokenizer.ggml.tokens"])

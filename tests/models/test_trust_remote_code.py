"""A checkpoint with its own Python code runs where the user says so, as transformers runs it; else no line of it does.

Red when: the flag lets code run that is not needed, or in a frontend; when nothing is said before it runs; when a
rebuilt tokenizer gives other ids than the code.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.checkpoint.code import read_tokenizer_code
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.errors import CheckpointError, ConfigError, OctavoError
from octavo.frontend.tokenizer import load_tokenizer
from octavo.models.transformers_tokenizer import rebuild_tokenizer

CODE = Path(__file__).parent / "checkpoint_code"
AUTO_MAP = {
    "AutoConfig": "configuration_odd.OddConfig",
    "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    "AutoTokenizer": ["tokenization_odd.OddTokenizer", None],
}
MERGED = [b"th", b"the", b"an", b" a", b"12", "é".encode(), b"\n\n"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 9, 33, 7, 12], [3], list(range(3, 50))]
LIMITS: dict[str, Any] = {
    "num_threads": 1, "dtype": "float32", "num_gpu_blocks_override": 40, "max_num_batched_tokens": 24,
    "max_num_seqs": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports code of a checkpoint from a copy: one for each test, which leaves nothing behind."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(modules))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def write(folder: Path, **changes: Any) -> Path:
    """The folder without weights. Each file of code leaves a line in ``trace`` when it runs."""
    folder.mkdir()
    for file in CODE.glob("*.py"):
        trace = f"with open({str(folder / 'trace')!r}, 'a') as trace:\n    trace.write({file.name + chr(10)!r})\n"
        (folder / file.name).write_text(file.read_text() + trace)
    config = {"architectures": ["OddForCausalLM"], "model_type": "odd_from_a_folder", "vocab_size": 320, "width": 48}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP, **changes}))
    ranks = [bytes([byte]) for byte in range(256)] + MERGED
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (folder / "odd.ranks").write_bytes(b"".join(lines))
    words = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def traces(folder: Path) -> set[str]:
    """Files of code that have run since the last question."""
    file = folder / "trace"
    found = set(file.read_text().splitlines()) if file.exists() else set()
    file.unlink(missing_ok=True)
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """With weights, and the model as transformers makes it."""
    folder = write(tmp_path / "odd-model")
    torch.manual_seed(0)
    load: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = load(config, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    saved = folder / "saved"
    model.save_pretrained(saved)
    shutil.move(saved / "model.safetensors", folder)
    shutil.rmtree(saved)
    traces(folder)
    return folder, model


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens or 0):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_same_tokens_as_transformers(
    checkpoint: tuple[Path, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    folder, model = checkpoint
    with caplog.at_level(logging.WARNING), LLM(str(folder), trust_remote_code=True, **LIMITS) as llm:
        said = [record.getMessage() for record in caplog.records if "trust_remote_code" in record.getMessage()]
        assert llm.ready.config.model.max_position_embeddings == 256  # known to the config class alone
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        text = "then 1234 and\n\néé <odd:end> 漢"
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ours = llm.get_tokenizer()
        assert ours.encode(text) == theirs.encode(text)
        assert ours.bos_token == "<odd:start>"
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    assert [output.outputs[0].token_ids for output in outputs] == [greedy(model, prompt) for prompt in PROMPTS]
    assert len(said) == 2
    assert "configuration_odd.py, modeling_odd.py" in said[0]
    assert "tokenization_odd.py" in said[1]


def test_a_sentencepiece_tokenizer_with_marks_of_its_own(tmp_path: Path) -> None:
    """What the code puts before every text, and tokens that no file names, are kept."""
    folder = write(tmp_path / "m")
    text = ["the quick brown fox jumps over the lazy dog again and again", "zwölf 12 été 漢字"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=330, hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, model_type="bpe", minloglevel=9,
    )  # fmt: skip
    (folder / "pieces.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_pieces.PieceTokenizer", None]}, "legacy": False})
    )
    code = read_tokenizer_code(folder)
    assert code is not None
    ours = load_tokenizer(rebuild_tokenizer(code))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for each in (*text, "[gMASK]<sop> zwölf", "  two\n"):
        assert ours.encode(each) == theirs.encode(each)
        assert ours.encode(each)[:2] == theirs.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert ours.decode(ours.encode("the fox"), skip_special_tokens=True) == "the fox"
    assert ours.eos_token == "</s>"


def test_without_the_flag_no_line_runs(tmp_path: Path) -> None:
    folder = write(tmp_path / "odd-model")
    with pytest.raises(OctavoError, match="only with --trust-remote-code"):
        LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, **LIMITS)
    full = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "architectures": ["OddForCausalLM"]}
    (folder / "config.json").write_text(
        json.dumps({**full, "vocab_size": 320, "model_type": "odd", "auto_map": AUTO_MAP})
    )
    with pytest.raises(ConfigError, match=r"configuration_odd\.py, modeling_odd\.py.*only with --trust-remote-code"):
        LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, **LIMITS)
    with pytest.raises(CheckpointError, match=r"tokenization_odd\.OddTokenizer.*only with --trust-remote-code"):
        load_tokenizer_data(folder)
    assert traces(folder) == set()


def test_code_that_is_not_needed_does_not_run_with_the_flag_either(tmp_path: Path) -> None:
    """Octavo has Llama: what runs is the tokenizer alone, and nothing where that is not wanted."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": 256}
    folder = write(tmp_path / "m", architectures=["LlamaForCausalLM"], model_type="llama", **sizes)
    options: dict[str, Any] = {"load_format": "dummy", "trust_remote_code": True, **LIMITS}
    LLM(str(folder), skip_tokenizer_init=True, **options).close()
    assert traces(folder) == set()
    LLM(str(folder), **options).close()
    assert traces(folder) == {"tokenization_odd.py"}


def test_a_frontend_runs_none_of_it(tmp_path: Path) -> None:
    """The engine in a process of its own: this one gets a plain tokenizer.json and never imports the code."""
    folder = write(tmp_path / "odd-model")
    with LLM(str(folder), in_process=False, load_format="dummy", trust_remote_code=True, **LIMITS) as llm:
        assert llm.generate("the 12", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        assert traces(folder) == {"configuration_odd.py", "modeling_odd.py", "tokenization_odd.py"}
        assert not any(name.endswith("_odd") for name in sys.modules)
        kept = Path(llm.ready.config.frontend.tokenizer)
        assert sorted(file.name for file in kept.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_that_cannot_be_rebuilt_exactly_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "odd-model")
    file = folder / "tokenization_odd.py"
    text = file.read_text()
    file.write_text(text.replace("self.encoding.encode(text, allowed", "self.encoding.encode(text[::-1], allowed"))
    with pytest.raises(ConfigError, match=r"OddTokenizer.*cannot be rebuilt: 'Hello, world!' is \[.*--tokenizer"):
        LLM(str(folder), load_format="dummy", trust_remote_code=True, **LIMITS)
    file.write_text(text.replace("self.vocab_file = vocab_file", "raise RuntimeError('no network')"))
    with pytest.raises(ConfigError, match="fails: RuntimeError: no network"):
        LLM(str(folder), load_format="dummy", trust_remote_code=True, **LIMITS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("someone/else--modeling_odd.OddForCausalLM", "only code in the checkpoint's own folder"),
        ("../modeling_odd.OddForCausalLM", "not of the form file.Class"),
        ("nowhere.OddForCausalLM", r"has no nowhere\.py"),
        ("outside.OddForCausalLM", "symbolic link out of the model folder"),
        ("modeling_odd.NoSuchClass", "cannot be imported: AttributeError"),
        ("broken.OddForCausalLM", "cannot be imported: ZeroDivisionError"),
        ("modeling_odd.OddByHand", "does not go through transformers' attention interface"),
    ],
)
def test_what_does_not_run_says_why(model: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "odd-model", auto_map={**AUTO_MAP, "AutoModelForCausalLM": model})
    (folder / "broken.py").write_text("1 / 0")
    (tmp_path / "elsewhere.py").write_text("")
    (folder / "outside.py").symlink_to(tmp_path / "elsewhere.py")
    code = folder / "modeling_odd.py"
    by_hand = (
        "\n\nclass OddByHand(OddForCausalLM):\n    def __init__(self, config):\n        super().__init__(config)\n"
    )
    by_hand += "        for layer in self.body.layers:\n            layer.attention.forward = lambda x, **_: x\n"
    code.write_text(code.read_text() + by_hand)
    with pytest.raises(OctavoError, match=message):
        LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, trust_remote_code=True, **LIMITS)


def test_python_files_of_a_repository_are_fetched_only_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "odd-model")
    asked: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    locate_model("org/odd")
    assert not any("*.py" in patterns for patterns in asked)
    asked.clear()
    locate_model("org/odd", with_code=True)
    assert all("*.py" in patterns for patterns in asked)


def test_the_flag_without_transformers_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "odd-model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install octavo\[transformers\]"):
        LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, trust_remote_code=True, **LIMITS)
    assert traces(folder) == set()

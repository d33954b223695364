"""What ``octavo bench serve`` asks: random token ids, lengths as in conversations, or prompts from a file.

Seeded: the same flags give the same requests. Knows no server.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from octavo.errors import ConfigError
from octavo.utils.text import shorten

CHARS_PER_TOKEN = 4
"""To guess the length of an answer in a file where nobody has counted its tokens."""
LOGNORMAL_SIGMA = 1.0
_WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my
made over did down only way find use may water long little very after words called just where most know
"""
COMMON_WORDS = tuple(_WORDS.split())
"""One token each, with a blank before them, in most vocabularies: for servers that take text only."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to be sent."""

    prompt: str | list[int]
    num_prompt_tokens: int
    """As far as known; the server's own count is reported where it tells."""
    max_tokens: int


def make_samples(namespace: argparse.Namespace, *, is_chat: bool) -> list[Sample]:
    """``num_prompts`` requests of the dataset that the flags name.

    Args:
        namespace: The parsed flags.
        is_chat: Prompts must be texts.

    Raises:
        ConfigError: The dataset cannot be had.
    """
    samples = DATASETS[namespace.dataset_name](namespace, is_chat)
    if len(samples) < namespace.num_prompts:
        # A short file is gone through again and again, as long as it takes.
        samples = [samples[index % len(samples)] for index in range(namespace.num_prompts)]
    return samples


def _random(namespace: argparse.Namespace, is_chat: bool) -> list[Sample]:
    draw = random.Random(namespace.seed)
    spread = namespace.random_range_ratio
    prefix = _ids(draw, namespace.random_prefix_len, namespace.random_max_id)

    def length(mean: int) -> int:
        return max(1, draw.randint(math.floor(mean * (1 - spread)), math.ceil(mean * (1 + spread))))

    return [
        _sample(
            draw, namespace, prefix, (length(namespace.random_input_len), length(namespace.random_output_len)), is_chat
        )
        for _ in range(namespace.num_prompts)
    ]


def _lognormal(namespace: argparse.Namespace, is_chat: bool) -> list[Sample]:
    draw = random.Random(namespace.seed)
    prefix = _ids(draw, namespace.random_prefix_len, namespace.random_max_id)

    def length(median: int) -> int:
        value = round(draw.lognormvariate(math.log(median), LOGNORMAL_SIGMA))
        return min(max(1, value), 8 * median)

    return [
        _sample(
            draw, namespace, prefix, (length(namespace.random_input_len), length(namespace.random_output_len)), is_chat
        )
        for _ in range(namespace.num_prompts)
    ]


def _ids(draw: random.Random, count: int, top: int) -> list[int]:
    return [draw.randint(0, top) for _ in range(count)]


def _sample(
    draw: random.Random, namespace: argparse.Namespace, prefix: list[int], lengths: tuple[int, int], is_chat: bool
) -> Sample:
    num_prompt, num_output = lengths
    ids = prefix + _ids(draw, num_prompt, namespace.random_max_id)
    if not is_chat:
        return Sample(ids, len(ids), num_output)
    return Sample(" ".join(COMMON_WORDS[each % len(COMMON_WORDS)] for each in ids), len(ids), num_output)


def _sharegpt(namespace: argparse.Namespace, _is_chat: bool) -> list[Sample]:
    path = _need_path(namespace)
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"dataset_path is {str(path)!r}, which is no JSON file: {error}", param="dataset_path"
        ) from None
    samples: list[Sample] = []
    for entry in cast("list[Any]", entries) if isinstance(entries, list) else ():
        turns: Any = cast("dict[str, Any]", entry).get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(cast("list[Any]", turns)) < 2:
            continue
        first, second = cast("list[dict[str, Any]]", turns)[:2]
        prompt, answer = str(first.get("value") or ""), str(second.get("value") or "")
        if prompt and answer:
            output = namespace.sharegpt_output_len or max(1, len(answer) // CHARS_PER_TOKEN)
            samples.append(Sample(prompt, max(1, len(prompt) // CHARS_PER_TOKEN), output))
    return _drawn(samples, namespace, path, "conversations of two turns or more ([{conversations: [{value: ...}]}])")


def _custom(namespace: argparse.Namespace, _is_chat: bool) -> list[Sample]:
    path = _need_path(namespace)
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"dataset_path is {str(path)!r}, which cannot be read: {error}", param="dataset_path"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row: Any = None
        try:
            row = json.loads(line)
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(
                f'dataset_path: line {number} is {shorten(line, 60)!r}, but must be like {{"prompt": "..."}}',
                param="dataset_path",
            )
        output = namespace.custom_output_len or row.get("output_tokens") or 256
        samples.append(Sample(prompt, max(1, len(prompt) // CHARS_PER_TOKEN), int(output)))
    return _drawn(samples, namespace, path, "prompts")


def _need_path(namespace: argparse.Namespace) -> Path:
    if namespace.dataset_path is None:
        raise ConfigError(f"the dataset {namespace.dataset_name} needs --dataset-path", param="dataset_path")
    return Path(namespace.dataset_path)


def _drawn(samples: list[Sample], namespace: argparse.Namespace, path: Path, what: str) -> list[Sample]:
    if not samples:
        raise ConfigError(f"dataset_path is {str(path)!r}, which holds no {what}", param="dataset_path")
    if not namespace.disable_shuffle:
        random.Random(namespace.seed).shuffle(samples)
    return samples[: namespace.num_prompts]


DATASETS: Mapping[str, Callable[[argparse.Namespace, bool], list[Sample]]] = {
    "random": _random,
    "lognormal": _lognormal,
    "sharegpt": _sharegpt,
    "custom": _custom,
}

"""What the commands share: sampling flags, the log, short error messages, and the lines about speed.

Texts that a program may read go to stdout; everything about the run goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

from octavo.cli.session import MakeSession, Reply, Session
from octavo.config.args import EngineArgs
from octavo.config.env import apply_environment, read_environment
from octavo.config.flags import FlagParser, add_setting_flag
from octavo.config.setting import Setting
from octavo.messages import EngineReady
from octavo.sampling_params import SamplingParams
from octavo.utils.logging import configure_logging, use_colour
from octavo.utils.text import format_bytes, format_count, format_seconds, plural

DIM, RESET, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\x1b[2K"
GROUP = "Sampling"
ENGINE_SESSION = "octavo.cli.engine_session:EngineSession"
"""Imported when an engine is started, because it takes torch along: a wrong flag is told without waiting for it."""
DEFAULT_MAX_TOKENS = 512
NEUTRAL_SAMPLING: Mapping[str, Any] = {"temperature": 0.2, "top_p": 0.9}
"""Of the terminal commands, for a model that recommends nothing: small models ramble at temperature 1."""
SAMPLING_FLAGS: Mapping[str, Setting] = {
    "max_tokens": Setting("count", "Most tokens to generate. Default: 512.", GROUP, low=1),
    "min_tokens": Setting("count", "Tokens to generate before the answer may end.", GROUP, low=0),
    "temperature": Setting(
        "number", "Randomness; 0 always takes the likeliest token. Default: the model's, else 0.2.", GROUP, low=0
    ),
    "top_p": Setting(
        "number", "Draw from the likeliest tokens with this total probability. Default: the model's, else 0.9.", GROUP,
        low=0, above_low=True, high=1,
    ),
    "top_k": Setting("count", "Draw from this many likeliest tokens; 0: all.", GROUP, low=-1),
    "min_p": Setting(
        "number", "Draw from tokens at least this share as likely as the likeliest.", GROUP, low=0, high=1
    ),
    "presence_penalty": Setting("number", "Discourage tokens that were generated.", GROUP, low=-2, high=2),
    "frequency_penalty": Setting("number", "Discourage tokens by how often they were used.", GROUP, low=-2, high=2),
    "repetition_penalty": Setting(
        "number", "Divide the scores of tokens seen in prompt or answer; 1: no change.", GROUP, low=0, above_low=True
    ),
    "stop": Setting("names", "Texts that end the answer.", GROUP),
    "stop_token_ids": Setting("names", "Token ids that end the answer.", GROUP),
    "include_stop_str_in_output": Setting("switch", "Keep the stop text.", GROUP),
    "ignore_eos": Setting("switch", "Do not end at the end-of-sequence token.", GROUP),
    "skip_special_tokens": Setting("switch", "Leave special tokens out of the text. Default: on.", GROUP),
    "bad_words": Setting("names", "Words that may not be generated.", GROUP),
    "allowed_token_ids": Setting("names", "The only token ids that may be generated.", GROUP),
    "logit_bias": Setting("table", 'Added to the scores of tokens, as JSON: {"50": -100}.', GROUP),
}  # fmt: skip
"""Flags of ``generate`` and ``chat``, named as the fields of SamplingParams."""
_ID_LISTS = ("stop_token_ids", "allowed_token_ids")


def add_sampling_flags(parser: FlagParser, extra: Mapping[str, Setting] | None = None) -> None:
    """Give ``parser`` the flags of SAMPLING_FLAGS and of ``extra``."""
    group, taken = parser.add_argument_group(GROUP), parser.flags()
    for name, setting in {**(extra or {}), **SAMPLING_FLAGS}.items():
        add_setting_flag(group, name, setting, taken)


def sampling_from(
    namespace: argparse.Namespace, defaults: Mapping[str, Any], extra: Mapping[str, Setting] | None = None, **fixed: Any
) -> SamplingParams:
    """SamplingParams of the flags that were given; the model's defaults, then ours, for those that were not.

    Raises:
        OctavoError: A value is impossible.
    """
    values: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS, **(defaults or NEUTRAL_SAMPLING)}
    for name, setting in {**(extra or {}), **SAMPLING_FLAGS}.items():
        if name in vars(namespace):
            value = setting.check(name, getattr(namespace, name))
            if name in _ID_LISTS:
                value = [Setting("count", "", "", low=0).check(name, item) for item in value]
            elif name == "logit_bias":
                value = {Setting("count", "", "", low=0).check(name, key): bias for key, bias in value.items()}
            values[name] = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
    return SamplingParams(**{**values, **fixed})


def add_output_flags(parser: FlagParser) -> None:
    """``--quiet`` and ``--verbose``."""
    group = parser.add_argument_group("What is told")
    group.add_argument("-q", "--quiet", action="store_true", help="Nothing on stderr but errors.")
    group.add_argument("-v", "--verbose", action="store_true", help="The whole start-up log.")


def set_up(namespace: argparse.Namespace, parser: FlagParser) -> None:
    """Configure the log as flags and environment say, and pass on what the parser noted.

    Raises:
        ConfigError: An environment variable has an impossible value.
    """
    environment = read_environment(os.environ)
    if environment.configure_logging:
        level = environment.logging_level
        is_set = any(os.environ.get(f"{prefix}_LOGGING_LEVEL") for prefix in ("OCTAVO", "VLLM"))
        if namespace.quiet:
            level = "error"
        elif not is_set:
            wants_stats = vars(namespace).get("disable_log_stats") is False
            level = "info" if namespace.verbose or wants_stats else "warning"
        log_format = vars(namespace).get("log_format", environment.log_format)
        configure_logging(level, log_format=log_format)
    if not namespace.quiet:
        for note in (*parser.notes, *environment.notes):
            tell(note)


def tell(text: str, *, end: str = "\n") -> None:
    """Write about the run to stderr, dimmed on a terminal."""
    if use_colour(sys.stderr):
        text = f"{DIM}{text}{RESET}"
    sys.stderr.write(text + end)
    sys.stderr.flush()


def start(args: EngineArgs, quiet: bool, make_session: MakeSession | None = None) -> Session:
    """Start an engine, and say what was started.

    Args:
        args: What was asked for.
        quiet: Say nothing.
        make_session: Something else than the real engine, for tests.

    Raises:
        OctavoError: It could not start.
    """
    begin_s = time.monotonic()
    is_shown = not quiet and use_colour(sys.stderr)
    if is_shown:
        tell(f"loading {args.model or 'the default model'} ...", end="\r")
    if make_session is None:
        module, _, function = ENGINE_SESSION.partition(":")
        make_session = cast("MakeSession", getattr(importlib.import_module(module), function))
    gc.disable()  # what is made here stays; see engine/core_main.py
    try:
        session = make_session(apply_environment(args, read_environment(os.environ)))
        gc.freeze()
    finally:
        gc.enable()
        if is_shown:
            sys.stderr.write(CLEAR_LINE)
    if not quiet:
        for line in describe_start(session.ready, time.monotonic() - begin_s):
            tell(line)
    return session


def describe_start(ready: EngineReady, seconds: float) -> list[str]:
    """Four lines about what runs where, and how long it took to start.

    Args:
        ready: What the engine found.
        seconds: From the start of the command to here.
    """
    config, reasons = ready.config, {decision.field: decision.reason for decision in ready.decisions}
    device = config.device
    why = reasons.get("attention_backend")
    quantization = "" if device.quantization == "none" else f", {device.quantization}"
    phases = ", ".join(f"{name} {format_seconds(each)}" for name, each in ready.phase_seconds.items())
    return [
        f"{config.frontend.served_model_names[0]} ({config.model.architecture}, {config.load.load_format}, "
        f"{format_bytes(ready.weights_bytes)}) on {device.device_type}: {device.dtype}{quantization}, "
        f"{plural(device.num_threads, 'thread')}",
        f"attention {ready.attention_backend}{f': {why}' if why else ''}",
        f"KV cache {format_count(ready.num_kv_tokens)} tokens; {ready.max_concurrency:.2f} requests of "
        f"{format_count(config.scheduler.max_model_len)} tokens fit at once",
        f"ready in {format_seconds(seconds)} ({phases})",
    ]


def describe_reply(reply: Reply, note: str = "") -> str:
    """One line: prompt and cached tokens, time to the first token, rate, and why the answer ended."""
    if reply.ttft_s is None:
        return f"nothing generated · {note}" if note else "nothing generated"
    parts = [
        f"{plural(reply.num_prompt_tokens, 'prompt token')} ({format_count(reply.num_cached_tokens)} cached)",
        f"first token {format_seconds(reply.ttft_s)}",
        f"{plural(reply.num_tokens, 'token')} in {format_seconds(reply.total_s)}",
    ]
    rate = reply.decode_tokens_per_s
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s")
    reasons = sorted({answer.finish_reason for answer in reply.answers if answer.finish_reason})
    if "length" in reasons:
        parts.append("cut at the token limit")
    if note:
        parts.append(note)
    return " · ".join(parts)

"""``octavo bench latency`` and ``octavo bench throughput``: how fast the engine is on this machine, as JSON.

``octavo bench workloads`` is in ``bench_workloads.py``.

Prompts are random token ids from a seed, and answers run to their full length, so that two runs do the same work.
Prefix caching is off unless asked for: repeated prompts would otherwise cost nothing. Time is measured from here, with
the engine in this process and without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.cli.common import add_output_flags, set_up, start, tell
from octavo.cli.exits import EXIT_USAGE
from octavo.cli.machine import cpu_features, describe_machine, describe_source, describe_versions
from octavo.cli.session import Answer, MakeSession, Reply, Session
from octavo.config.args import EngineArgs
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from
from octavo.config.resolve import DEFAULT_MAX_QUEUED_REQS, DEFAULT_MAX_QUEUED_TOKENS
from octavo.errors import ConfigError, OctavoError
from octavo.sampling_params import SamplingParams
from octavo.utils.text import did_you_mean, format_seconds

PERCENTILES = (10, 25, 50, 75, 90, 99)
KINDS: Mapping[str, str] = {
    "latency": "Time of one batch from start to end, again and again.",
    "throughput": "Requests and tokens per second with everything submitted at once.",
}
OTHER_KINDS: Mapping[str, tuple[str, str]] = {
    "serve": ("octavo.cli.bench_serve:main", "Load any OpenAI-compatible server, and measure what its users feel."),
    "workloads": (
        "octavo.cli.bench_workloads:main",
        "Fixed workloads on dummy weights, beside what the device could do.",
    ),
}
"""Measurements with flags of their own: where they are, and what they do."""
ABSENT: Mapping[str, str] = {
    "startup": "the start-up time is in the report of latency and throughput (startup_s)",
    "sweep": "run latency or throughput once per setting",
}


def main(argv: Sequence[str], make_session: MakeSession | None = None) -> int:
    """Run the command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        summaries = {**KINDS, **{kind: summary for kind, (_, summary) in OTHER_KINDS.items()}}
        lines = [f"  {kind:<11} {summary}" for kind, summary in summaries.items()]
        sys.stdout.write("\n".join([f"usage: octavo bench {{{','.join(summaries)}}} [flags]", "", *lines, ""]))
        return 0 if argv else EXIT_USAGE
    kind = argv[0]
    if kind in OTHER_KINDS:
        module, _, function = OTHER_KINDS[kind][0].partition(":")
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    if kind not in KINDS:
        why = ABSENT.get(kind, f"there is no such measurement.{did_you_mean(kind, [*KINDS, *OTHER_KINDS])}")
        sys.stderr.write(f"octavo bench {kind}: {why}\nSee octavo bench --help.\n")
        return EXIT_USAGE
    parser = make_parser(kind)
    namespace = parser.parse(argv[1:])
    set_up(namespace, parser)
    check_sizes(namespace)
    args = engine_args_from(namespace)
    if "enable_prefix_caching" not in vars(namespace):
        args = replace(args, enable_prefix_caching=False)
    args = with_room(args, namespace.batch_size if kind == "latency" else namespace.num_prompts, namespace.input_len)
    if namespace.output_json is not None and not Path(namespace.output_json).absolute().parent.is_dir():
        raise ConfigError(
            f"output_json is {namespace.output_json!r}, but there is no such folder", param="output_json"
        )  # told before minutes of measuring
    begin_s = time.monotonic()
    session = start(args, namespace.quiet, make_session)
    startup_s = time.monotonic() - begin_s
    try:
        result = (_latency if kind == "latency" else _throughput)(session, namespace)
        report = _report(kind, argv, session, startup_s, result)
    finally:
        session.close()
    _write(report, namespace)
    return 0


def make_parser(kind: str) -> FlagParser:
    """The flags of one kind of measurement."""
    parser = FlagParser(prog=f"octavo bench {kind}", description=KINDS[kind])
    group = parser.add_argument_group("Workload")

    def number(flag: str, default: int, text: str) -> None:
        group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} Default: {default}.")

    number("--input-len", 32 if kind == "latency" else 256, "Tokens per prompt.")
    number("--output-len", 128, "Tokens per answer.")
    if kind == "latency":
        number("--batch-size", 8, "Requests at a time.")
        number("--num-iters", 10, "Times measured.")
        number("--num-iters-warmup", 2, "Times run before that.")
    else:
        number("--num-prompts", 64, "Requests in all.")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="Of sampling; 0 is greedy. Default: 1.0."
    )
    group.add_argument("--output-json", metavar="FILE", help="Write the report there instead of stdout.")
    add_output_flags(parser)
    add_engine_flags(parser)
    return parser


def with_room(args: EngineArgs, num_requests: int, input_len: int) -> EngineArgs:
    """``args`` with a queue that takes everything at once, where its limits were left to us."""
    return replace(
        args,
        max_num_queued_reqs=args.max_num_queued_reqs or max(DEFAULT_MAX_QUEUED_REQS, num_requests),
        max_num_queued_tokens=args.max_num_queued_tokens or max(DEFAULT_MAX_QUEUED_TOKENS, num_requests * input_len),
    )


def check_sizes(namespace: argparse.Namespace) -> None:
    """Refuse sizes that are no sizes.

    Raises:
        ConfigError: ``param`` names the flag.
    """
    for name in ("input_len", "output_len", "batch_size", "num_iters", "num_prompts", "num_iters_warmup"):
        value = getattr(namespace, name, 1)
        least = 0 if name == "num_iters_warmup" else 1
        if value < least:
            raise ConfigError(f"{name} is {value}, but must be at least {least}", param=name)
    if not 0 <= namespace.temperature < math.inf:
        raise ConfigError(f"temperature is {namespace.temperature}, but must be at least 0", param="temperature")


def _latency(session: Session, namespace: argparse.Namespace) -> dict[str, Any]:
    params = _params(session, namespace)
    prompts = _prompts(session, namespace.batch_size, namespace.input_len, _seed(session))
    seconds: list[float] = []
    replies: list[Reply] = []
    for iteration in range(namespace.num_iters_warmup + namespace.num_iters):
        begin_s = time.monotonic()
        batch = session.run(_all(session, prompts, params))
        took_s = time.monotonic() - begin_s
        is_warmup = iteration < namespace.num_iters_warmup
        if not is_warmup:
            seconds.append(took_s)
            replies.extend(batch)
        if not namespace.quiet:
            tell(f"{'warm-up' if is_warmup else f'iteration {len(seconds)}'}: {format_seconds(took_s)}")
    tokens = namespace.batch_size * namespace.output_len
    return {
        "workload": _workload(namespace, "batch_size", "num_iters", "num_iters_warmup"),
        "latency_s": summarise(seconds),
        "output_tokens_per_s": tokens / statistics.median(seconds),
        **_per_request(replies),
        "iterations_s": seconds,
    }


def _throughput(session: Session, namespace: argparse.Namespace) -> dict[str, Any]:
    params = _params(session, namespace)
    prompts = _prompts(session, namespace.num_prompts, namespace.input_len, _seed(session))
    # One short request first, so that what is made on first use is not part of the measurement.
    session.run(_all(session, prompts[:1], _params(session, namespace, output_len=2)))
    begin_s = time.monotonic()
    replies = session.run(_all(session, prompts, params))
    took_s = time.monotonic() - begin_s
    prompt_tokens = sum(reply.num_prompt_tokens for reply in replies)
    output_tokens = sum(reply.num_tokens for reply in replies)
    return {
        "workload": _workload(namespace, "num_prompts"),
        "elapsed_s": took_s,
        "num_requests": len(replies),
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_s": len(replies) / took_s,
        "tokens_per_s": (prompt_tokens + output_tokens) / took_s,
        "output_tokens_per_s": output_tokens / took_s,
        **_per_request(replies),
    }


async def _all(session: Session, prompts: Sequence[list[int]], params: SamplingParams) -> list[Reply]:
    """Submit all at once and wait for the last.

    Raises:
        OctavoError: One of them failed, or ended early.
    """

    async def one(prompt: list[int]) -> Reply:
        reply = Reply(time.monotonic(), [Answer()])
        async with aclosing(session.stream(prompt, params, reply)) as pieces:
            async for _ in pieces:
                pass
        if reply.num_tokens != params.max_tokens:
            reason = reply.answers[0].error or reply.answers[0].finish_reason
            raise OctavoError(f"a request ended after {reply.num_tokens} of {params.max_tokens} tokens: {reason}")
        return reply

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def _params(session: Session, namespace: argparse.Namespace, output_len: int | None = None) -> SamplingParams:
    limit = session.ready.config.scheduler.max_model_len
    if namespace.input_len + namespace.output_len > limit:
        raise ConfigError(
            f"input_len + output_len is {namespace.input_len + namespace.output_len}, but the context holds {limit} "
            "tokens",
            param="input_len",
        )
    return SamplingParams(
        temperature=namespace.temperature,
        max_tokens=output_len or namespace.output_len,
        ignore_eos=True,
        detokenize=not session.ready.config.frontend.skip_tokenizer_init,
    )


def _seed(session: Session) -> int:
    return session.ready.config.frontend.seed


def _prompts(session: Session, count: int, length: int, seed: int) -> list[list[int]]:
    """[count] lists of ``length`` random token ids."""
    generator, vocab_size = random.Random(seed), session.ready.config.model.vocab_size
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def _workload(namespace: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(namespace, name) for name in ("input_len", "output_len", *names, "temperature")}


def _per_request(replies: Sequence[Reply]) -> dict[str, Any]:
    """Time to the first token, and between tokens, over all requests."""
    firsts = [reply.ttft_s for reply in replies if reply.ttft_s is not None]
    gaps = [1 / reply.decode_tokens_per_s for reply in replies if reply.decode_tokens_per_s]
    return {
        "time_to_first_token_s": summarise(firsts),
        "time_per_output_token_s": summarise(gaps) if gaps else None,
        "num_cached_tokens": sum(reply.num_cached_tokens for reply in replies),
    }


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median, extremes and percentiles (nearest rank) of at least one value."""
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "percentiles": {
            str(percent): ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] for percent in PERCENTILES
        },
    }


def _report(
    kind: str, argv: Sequence[str], session: Session, startup_s: float, result: Mapping[str, Any]
) -> dict[str, Any]:
    ready = session.ready
    return {
        "benchmark": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["octavo", "bench", *argv]),
        "machine": {**describe_machine(), "cpu_features": cpu_features()},
        "versions": {name: each for name, each in describe_versions().items() if each is not None},
        "commit": describe_source()["commit"],
        "engine": {
            "model": ready.config.frontend.served_model_names[0],
            "device": ready.config.device.device_type,
            "dtype": ready.config.device.dtype,
            "quantization": ready.config.device.quantization,
            "attention_backend": ready.attention_backend,
            "num_threads": ready.config.device.num_threads,
            "max_num_seqs": ready.config.scheduler.max_num_seqs,
            "max_num_batched_tokens": ready.config.scheduler.max_num_batched_tokens,
            "enable_prefix_caching": ready.config.cache.enable_prefix_caching,
            "num_kv_tokens": ready.num_kv_tokens,
        },
        "startup_s": startup_s,
        "startup_phases_s": ready.phase_seconds,
        **result,
    }


def _write(report: Mapping[str, Any], namespace: argparse.Namespace) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if namespace.output_json is None:
        sys.stdout.write(text)
    else:
        try:
            Path(namespace.output_json).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {namespace.output_json}: {error.strerror}", param="output_json") from None
    if namespace.quiet:
        return
    if report["benchmark"] == "latency":
        tell(f"median latency {format_seconds(report['latency_s']['median'])}")
    tell(
        f"{report['output_tokens_per_s']:.1f} output tokens/s, first token after "
        f"{format_seconds(report['time_to_first_token_s']['median'])} (median)"
    )

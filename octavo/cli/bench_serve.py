"""``octavo bench serve``: load any OpenAI-compatible server and measure what its users would feel.

Flags and result keys are those of vLLM's command of the same name, so that scripts can be kept. What to ask is in
``bench_data.py``, the client in ``bench_client.py``, numbers and pictures in ``bench_report.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.cli.bench_data import DATASETS, Sample, make_samples
from octavo.cli.common import CLEAR_LINE, set_up, tell
from octavo.cli.exits import EXIT_ERROR
from octavo.cli.machine import describe_machine, describe_source
from octavo.cli.openai_client import OpenAIClient, ServerError, find_api_key
from octavo.config.flags import FlagParser
from octavo.errors import ConfigError
from octavo.utils.text import plural, shorten

PROG = "octavo bench serve"
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions", "vllm": "/v1/completions"}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 when no request succeeded."""
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    checked = _check(namespace)
    try:
        client = importlib.import_module("octavo.cli.bench_client")
    except ImportError as error:
        raise ConfigError(f"octavo bench serve needs {error.name}: pip install 'octavo[bench]'") from None
    report = importlib.import_module("octavo.cli.bench_report")
    if namespace.plot:
        report.need_plotting()
    target = _target(namespace, client)
    samples = make_samples(namespace, is_chat=target.is_chat)
    load = client.Load(
        request_rate=namespace.request_rate, burstiness=namespace.burstiness,
        max_concurrency=namespace.max_concurrency, seed=namespace.seed,
    )  # fmt: skip
    run = _run_loop(_measure(namespace, client, target, samples, load))
    result = report.summarize(run, checked["metrics"], checked["percentiles"], checked["goodput"])
    report.print_table(result, checked["metrics"], checked["percentiles"], sys.stdout)
    for line in (*_failures(run.timings), *report.doubts(result)):
        sys.stderr.write(f"{line}\n")
    if namespace.save_result or namespace.save_detailed or namespace.result_filename:
        _save(namespace, target, run, result)
    if namespace.plot:
        report.plot(run, namespace.plot)
    return 0 if result["completed"] else EXIT_ERROR


def make_parser() -> FlagParser:
    """The command's flags."""
    parser = FlagParser(prog=PROG, description="Load an OpenAI-compatible server and measure it.")
    _add_server_flags(parser)
    _add_load_flags(parser)
    _add_data_flags(parser)
    group = parser.add_argument_group("Results")
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES", help="Of ttft, tpot, itl, e2el."
    )
    group.add_argument("--metric-percentiles", default="50,90,95,99", metavar="NUMBERS", help="Default: 50,90,95,99.")
    group.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="Count requests within limits, such as ttft:500 tpot:50 e2el:5000.",
    )  # fmt: skip
    group.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    group.add_argument("--save-detailed", action="store_true", help="With every request's times.")
    group.add_argument("--result-dir", default=".", metavar="DIR", help="Where to write it.")
    group.add_argument("--result-filename", metavar="FILE", help="Default: made of backend, rate, model and date.")
    group.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="Kept in the result.")
    group.add_argument("--plot", metavar="FILE", help="Draw the run into an image file; needs matplotlib.")
    group.add_argument("--disable-tqdm", action="store_true", help="Show no progress.")
    group.add_argument("-q", "--quiet", action="store_true", help="Nothing on stderr but errors and doubts.")
    group.add_argument("-v", "--verbose", action="store_true", help="Log more.")
    return parser


def _add_server_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("Server")
    group.add_argument(
        "--backend", "--endpoint-type", default="openai", choices=tuple(ENDPOINTS),
        help="openai: text completions; openai-chat: chat completions.",
    )  # fmt: skip
    group.add_argument("--base-url", metavar="URL", help="Of the server, with or without /v1. Wins over host and port.")
    group.add_argument("--host", default="127.0.0.1", help="Default: 127.0.0.1.")
    group.add_argument("--port", type=int, default=8000, help="Default: 8000.")
    group.add_argument("--endpoint", metavar="PATH", help="Default: by backend.")
    group.add_argument("--model", metavar="NAME", help="Default: the first that the server has.")
    group.add_argument("--served-model-name", metavar="NAME", help="As --model, and wins over it.")
    group.add_argument("--api-key", metavar="KEY", help="Default: of the environment (OPENAI_API_KEY and others).")
    group.add_argument("--header", nargs="*", default=[], metavar="KEY=VALUE", help="Sent with every request.")
    group.add_argument("--extra-body", default="{}", metavar="JSON", help="Fields of every request.")
    for name in SAMPLING:
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=f"The request's {name}.")
    group.add_argument("--ignore-eos", action="store_true", help="Answers run to their full length.")
    group.add_argument("--logprobs", type=int, metavar="N", help="Ask for that many per token.")
    group.add_argument("--timeout", type=float, default=6 * 3600.0, metavar="SECONDS", help="Of a request.")


def _add_load_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("Load")
    group.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="Requests. Default: 1000.")
    group.add_argument(
        "--request-rate", type=float, default=float("inf"), metavar="PER_S", help="Default: inf, all at once."
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X",
        help="Of arrivals: 1 is Poisson, less is burstier, more is more even.",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=int, metavar="N", help="Most requests at once. Default: no limit.")
    group.add_argument("--num-warmups", type=int, default=0, metavar="N", help="Requests before it counts.")
    group.add_argument("--seed", type=int, default=0, help="Of prompts and arrivals.")


def _add_data_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--dataset-name", default="random", choices=tuple(DATASETS),
        help="random: token ids of even lengths; lognormal: many short and few long, as in conversations; sharegpt: a "
        'JSON file of conversations; custom: a file of {"prompt": ..., "output_tokens": ...} lines.',
    )  # fmt: skip
    group.add_argument("--dataset-path", metavar="FILE", help="Of sharegpt and custom.")
    group.add_argument("--disable-shuffle", action="store_true", help="Take a file's entries in their order.")
    group.add_argument(
        "--random-input-len", type=int, default=1024, metavar="N", help="Mean, or median. Default: 1024."
    )
    group.add_argument("--random-output-len", type=int, default=128, metavar="N", help="The same. Default: 128.")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="X", help="Lengths within mean * (1 - X, 1 + X)."
    )
    group.add_argument("--random-prefix-len", type=int, default=0, metavar="N", help="Tokens that all have in common.")
    group.add_argument("--random-max-id", type=int, default=10_000, metavar="ID", help="Greatest token id.")
    group.add_argument("--sharegpt-output-len", type=int, metavar="N", help="Default: as in the file.")
    group.add_argument("--custom-output-len", type=int, metavar="N", help="Default: as in the file, else 256.")


def _check(namespace: argparse.Namespace) -> dict[str, Any]:
    """Refuse what cannot be; returns the lists among the flags as lists.

    Raises:
        ConfigError: ``param`` names the flag.
    """
    least = {
        "num_prompts": 1, "max_concurrency": 1, "num_warmups": 0, "random_input_len": 1, "random_output_len": 1,
        "random_prefix_len": 0, "random_max_id": 0, "sharegpt_output_len": 1, "custom_output_len": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(namespace, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}, but must be at least {low}", param=name)
    for name in ("request_rate", "burstiness", "timeout"):
        if not getattr(namespace, name) > 0:
            raise ConfigError(f"{name} is {getattr(namespace, name)}, but must be above 0", param=name)
    if not 0 <= namespace.random_range_ratio < 1:
        raise ConfigError("random_range_ratio must be at least 0 and below 1", param="random_range_ratio")
    metrics = [name.strip() for name in namespace.percentile_metrics.split(",") if name.strip()]
    if not metrics or set(metrics) - {"ttft", "tpot", "itl", "e2el"}:
        raise ConfigError(
            f"percentile_metrics is {namespace.percentile_metrics!r}, but must be of ttft, tpot, itl, e2el",
            param="percentile_metrics",
        )
    try:
        percentiles = [float(each) for each in namespace.metric_percentiles.split(",")]
    except ValueError:
        percentiles = [-1.0]
    if not all(0 <= each <= 100 for each in percentiles):
        raise ConfigError(
            f"metric_percentiles is {namespace.metric_percentiles!r}, but must be numbers from 0 to 100",
            param="metric_percentiles",
        )
    return {"metrics": metrics, "percentiles": percentiles, "goodput": _goodput(namespace.goodput)}


def _goodput(words: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in GOODPUT_METRICS or limit < 0:
            raise ConfigError(
                f"goodput is {word!r}, but must be one of {', '.join(GOODPUT_METRICS)} with milliseconds: ttft:500",
                param="goodput",
            )
        limits[name] = limit
    return limits


def _pairs(words: Sequence[str], param: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"{param} is {word!r}, but must be KEY=VALUE", param=param)
        pairs[name] = value
    return pairs


def _target(namespace: argparse.Namespace, client: Any) -> Any:
    base = (namespace.base_url or f"http://{namespace.host}:{namespace.port}").rstrip("/")
    root, endpoint = base.removesuffix("/v1"), namespace.endpoint or ENDPOINTS[namespace.backend]
    key = find_api_key(namespace.api_key)
    model = namespace.served_model_name or namespace.model
    if model is None:
        names = OpenAIClient(f"{root}/v1", key).model_names()
        if not names:
            raise ServerError(f"{base} serves no model")
        model = names[0]
    try:
        extra = json.loads(namespace.extra_body)
        assert isinstance(extra, dict)
    except (ValueError, AssertionError):
        raise ConfigError(
            f"extra_body is {shorten(namespace.extra_body, 60)!r}, but must be a JSON object", param="extra_body"
        ) from None
    given = {name: getattr(namespace, name) for name in SAMPLING if getattr(namespace, name) is not None}
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    is_chat = "chat" in endpoint
    if namespace.ignore_eos:
        given["ignore_eos"] = True
    if namespace.logprobs is not None:
        given.update(
            {"logprobs": True, "top_logprobs": namespace.logprobs} if is_chat else {"logprobs": namespace.logprobs}
        )
    headers = _pairs(namespace.header, "header")
    if key:
        headers.setdefault("Authorization", f"Bearer {key}")
    return client.Target(
        url=(root if endpoint.startswith("/v1/") else base) + endpoint, is_chat=is_chat, model=model,
        headers=headers, extra_body={**given, **extra}, timeout_s=namespace.timeout,
        keep_text=namespace.save_detailed,
    )  # fmt: skip


async def _measure(namespace: argparse.Namespace, client: Any, target: Any, samples: list[Sample], load: Any) -> Any:
    num_done, is_shown = 0, sys.stderr.isatty() and not (namespace.disable_tqdm or namespace.quiet)

    def on_done(_: Any) -> None:
        nonlocal num_done
        num_done += 1
        if is_shown:
            tell(f"{CLEAR_LINE}{num_done:,} of {plural(len(samples), 'request')}", end="\r")

    async with client.BenchClient(target) as sender:
        now = client.Load(request_rate=float("inf"), burstiness=1.0, max_concurrency=load.max_concurrency, seed=0)
        (first,) = (await sender.run(samples[:1], now)).timings
        if first.error is not None:
            raise ServerError(f"a first request failed, so no more were sent: {first.error}")
        if namespace.num_warmups:
            draw = random.Random(namespace.seed + 1)
            await sender.run([draw.choice(samples) for _ in range(namespace.num_warmups)], now)
        if not namespace.quiet:
            tell(f"{plural(len(samples), 'request')} to {target.url}, model {target.model}")
        run = await sender.run(samples, load, on_done)
    if is_shown:
        sys.stderr.write(CLEAR_LINE)
    return run


def _run_loop(work: Any) -> Any:
    """On uvloop where it is installed: a client that costs less measures better."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _failures(timings: Sequence[Any]) -> list[str]:
    """What went wrong how often, the most frequent first."""
    counts: dict[str, int] = {}
    for each in timings:
        if each.error is not None:
            counts[each.error] = counts.get(each.error, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [f"{plural(count, 'request')} failed: {error}" for error, count in ordered[:5]]


def _save(namespace: argparse.Namespace, target: Any, run: Any, result: dict[str, Any]) -> None:
    date = datetime.now(UTC)
    whole: dict[str, Any] = {
        "date": date.strftime("%Y%m%d-%H%M%S"),
        "backend": namespace.backend,
        "endpoint": target.url,
        "model_id": target.model,
        "num_prompts": namespace.num_prompts,
        "dataset_name": namespace.dataset_name,
        "request_rate": "inf" if namespace.request_rate == float("inf") else namespace.request_rate,
        "burstiness": namespace.burstiness,
        "max_concurrency": namespace.max_concurrency,
        "seed": namespace.seed,
        **_pairs(namespace.metadata, "metadata"),
        **result,
        "machine": describe_machine(),
        "source": describe_source(),
    }
    if namespace.save_detailed:
        whole |= {
            "input_lens": [each.num_prompt_tokens for each in run.timings],
            "output_lens": [each.num_output_tokens for each in run.timings],
            "start_times": [each.start_s for each in run.timings],
            "ttfts": [each.ttft_s for each in run.timings],
            "itls": [each.gaps_s for each in run.timings],
            "generated_texts": [each.text for each in run.timings],
            "errors": [each.error or "" for each in run.timings],
        }
    model = target.model.rsplit("/", 1)[-1]
    name = namespace.result_filename or f"{namespace.backend}-{whole['request_rate']}qps-{model}-{whole['date']}.json"
    path = Path(namespace.result_dir, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="result_dir") from error
    tell(f"written to {path}")

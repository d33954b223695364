"""``octavo attention``: which attention backends there are, what speaks against each here, and how fast they are."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import locate_model
from octavo.checkpoint.pooling_reader import read_pooling
from octavo.cli.common import add_output_flags, set_up, tell
from octavo.config.args import EngineArgs
from octavo.config.flags import FlagParser
from octavo.errors import ConfigError

MEASURE, SPEC = "octavo.attention.measure", "octavo.attention.backend:AttentionSpec"
"""Imported when the command runs, because they take torch along."""
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 when no backend can be used."""
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    torch: Any = importlib.import_module("torch")
    measure: Any = importlib.import_module(MEASURE)
    device = namespace.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and namespace.bench and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device here to measure on", param="device")
    reports: list[dict[str, Any]] = []
    for window in _windows(namespace):
        fields = spec_fields(namespace, device, window)
        spec = _make_spec(torch, fields)
        chosen, reasons = measure.survey(spec, device)
        report: dict[str, Any] = {"device": device, "spec": fields, "auto": chosen, "backends": reasons}
        if namespace.bench:
            report["times"] = _bench(measure, spec, device, reasons, namespace.quiet)
        reports.append(report)
    if namespace.json:
        sys.stdout.write(json.dumps(reports, indent=2) + "\n")
    else:
        sys.stdout.write("\n\n".join("\n".join(describe(report)) for report in reports) + "\n")
    return 0 if all("" in report["backends"].values() for report in reports) else 1


def make_parser() -> FlagParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="octavo attention",
        description="List the attention backends, what speaks against each, and with --bench how fast they are here.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Ask for this model's attention layers.")
    group = parser.add_argument_group("Attention layers, where no model is given")
    numbers = {"num-heads": 32, "num-kv-heads": 8, "head-dim": 128}
    for name, default in numbers.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"Default: {default}.")
    group.add_argument("--sliding-window", type=int, metavar="N", help="Tokens that a query sees.")
    group.add_argument("--logit-softcap", type=float, metavar="X", help="Bound of the scores.")
    group.add_argument("--sinks", action="store_true", help="Every head has a learned score without a value.")
    group = parser.add_argument_group("Engine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Default: auto.")
    group.add_argument("--dtype", choices=DTYPES, help="Default: bfloat16 on a GPU, float32 on a CPU.")
    group.add_argument("--kv-cache-dtype", choices=DTYPES, help="Default: as --dtype.")
    group.add_argument("--block-size", type=int, metavar="N", help="16 to 256. Default: 64 on a GPU, 16 on a CPU.")
    group = parser.add_argument_group("Report")
    group.add_argument("--bench", action="store_true", help="Measure one layer of each usable backend.")
    group.add_argument("--json", action="store_true", help="As JSON.")
    add_output_flags(parser)
    return parser


def spec_fields(namespace: argparse.Namespace, device: str, window: int | None) -> dict[str, Any]:
    """What the layers ask for, as plain data.

    Raises:
        ConfigError: A number is impossible.
    """
    heads, kv_heads, size = namespace.num_heads, namespace.num_kv_heads, namespace.head_dim
    softcap, has_sinks, is_bidirectional = namespace.logit_softcap, namespace.sinks, False
    if namespace.model is not None:
        located = locate_model(namespace.model)
        config = read_model_config(located)
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        softcap, has_sinks = config.attention_softcap, config.has_sinks
        is_bidirectional = read_pooling(located, config).is_encoder
    dtype = namespace.dtype or ("bfloat16" if device == "cuda" else "float32")
    block_size = (64 if device == "cuda" else 16) if namespace.block_size is None else namespace.block_size
    fields = {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": size,
        "block_size": block_size, "dtype": dtype,
        "kv_dtype": namespace.kv_cache_dtype or dtype, "sliding_window": window,
        "logit_softcap": softcap, "has_sinks": has_sinks, "is_bidirectional": is_bidirectional,
    }  # fmt: skip
    for name, value in fields.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}, but must be a number above 0", param=name)
    EngineArgs(block_size=block_size)  # says which there are
    return fields


def _windows(namespace: argparse.Namespace) -> list[int | None]:
    """Each kind of layer once."""
    if namespace.model is None:
        return [namespace.sliding_window]
    config = read_model_config(locate_model(namespace.model))
    return list(dict.fromkeys(config.windows))


def _make_spec(torch: Any, fields: Mapping[str, Any]) -> Any:
    module, _, name = SPEC.partition(":")
    values = {**fields, "dtype": getattr(torch, fields["dtype"]), "kv_dtype": getattr(torch, fields["kv_dtype"])}
    return getattr(importlib.import_module(module), name)(scale=fields["head_dim"] ** -0.5, **values)


def _bench(measure: Any, spec: Any, device: str, reasons: Mapping[str, str], quiet: bool) -> dict[str, dict[str, Any]]:
    """Case to backend to its time, or to what went wrong."""
    times: dict[str, dict[str, Any]] = {}
    for case in measure.CASES[device]:
        times[case.name] = {}
        for name in [name for name, reason in reasons.items() if not reason]:
            if not quiet:
                tell(f"{case.name}: {name}")
            try:
                found = measure.measure(name, spec, case, device)
            except Exception as error:  # one backend that fails must not hide the others
                times[case.name][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
                continue
            times[case.name][name] = {
                "ms": found.milliseconds, "TBps": found.terabytes_per_s, "TFLOPs": found.teraflops,
            }  # fmt: skip
    return times


def describe(report: Mapping[str, Any]) -> list[str]:
    """Lines for a person."""
    spec, backends = report["spec"], report["backends"]
    width = max(map(len, backends))
    window = f", window {spec['sliding_window']}" if spec["sliding_window"] else ""
    cap = f", softcap {spec['logit_softcap']}" if spec["logit_softcap"] else ""
    cap += ", sinks" if spec["has_sinks"] else ""
    cap += ", to both sides" if spec["is_bidirectional"] else ""
    lines = [
        f"{spec['num_heads']} query heads, {spec['num_kv_heads']} KV heads of {spec['head_dim']}, {spec['dtype']}, "
        f"cache {spec['kv_dtype']} in blocks of {spec['block_size']}{window}{cap}, on {report['device']}",
        f"auto takes {report['auto']}" if "" in backends.values() else "auto finds none that serves these layers",
        *(f"  {name:<{width}}  {reason or 'usable'}" for name, reason in backends.items()),
    ]
    for case, found in report.get("times", {}).items():
        lines.append(f"{case}:")
        for name, time in found.items():
            if "error" in time:
                lines.append(f"  {name:<{width}}  failed: {time['error'].splitlines()[0]}")
                continue
            rate = f"{1e3 * time['TBps']:.0f} GB/s" if case.startswith("decode") else f"{time['TFLOPs']:.3g} TFLOP/s"
            lines.append(f"  {name:<{width}}  {time['ms']:9.4f} ms  {rate}")
    return lines

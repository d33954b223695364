"""The few environment variables that are read, under our own name first and then under vLLM's.

A flag always wins over a variable. ``read_environment`` is pure over the mapping that it is given;
``apply_environment`` fills those settings of an ``EngineArgs`` that were left at their default. Variables of torch,
Hugging Face and CUDA (``HF_HOME``, ``CUDA_VISIBLE_DEVICES``, ``NO_COLOR``, ...) keep their meaning and are read by
their owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.config.args import EngineArgs
from octavo.config.setting import Setting
from octavo.utils.text import did_you_mean

VARIABLES: Mapping[str, Setting] = {
    "LOGGING_LEVEL": Setting(
        "text", "What the log shows.", "", choices=("debug", "info", "warning", "error", "critical")
    ),
    "LOG_FORMAT": Setting("text", "text: for people; json: one object per line.", "", choices=("text", "json")),
    "CONFIGURE_LOGGING": Setting(
        "count", "0: the command line leaves logging to the program around it.", "", low=0, high=1
    ),
    "LOG_STATS_INTERVAL": Setting("number", "Seconds between two lines of statistics.", "", low=0, above_low=True),
    "ATTENTION_BACKEND": Setting("text", "As --attention-backend.", ""),
    "ALLOW_LONG_MAX_MODEL_LEN": Setting("count", "1: as --allow-long-max-model-len.", "", low=0, high=1),
    "TORCH_PROFILER_DIR": Setting("text", "As --torch-profiler-dir.", ""),
    "API_KEY": Setting("text", "A key that the server asks for; as --api-key.", ""),
    "ADMIN_API_KEY": Setting("text", "A key for the server's administrators; as --admin-api-key.", ""),
    "CPU_KVCACHE_SPACE": Setting(
        "number", "GiB of KV cache on a CPU; as --kv-cache-memory-bytes.", "", low=0, above_low=True, high=2**20
    ),
}
"""Each is read as ``OCTAVO_<name>``, else as ``VLLM_<name>``."""
ELSEWHERE = {
    "NATIVE_KERNELS": "utils/compiler.py: 0 uses no compiled CPU kernels",
    "KERNELS_PDL": "kernels/gpu/launch.py: 0 launches no GPU kernel before the one ahead of it has ended",
}
"""Switches that only we have, to find faults, as ``OCTAVO_<name>``; and who reads them."""
SECRET = ("API_KEY", "ADMIN_API_KEY")
"""Their values are never shown, and processes that need none do not get them."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables that are set, as values; ``notes`` says in one line each which were read and which mean nothing."""

    logging_level: str = "info"
    log_format: str = "text"
    configure_logging: bool = True
    log_stats_interval_s: float = 10.0
    attention_backend: str | None = None
    allow_long_max_model_len: bool = False
    cpu_kv_cache_bytes: int | None = None
    torch_profiler_dir: str | None = None
    api_key: str | None = None
    admin_api_key: str | None = None
    notes: tuple[str, ...] = ()


def read_environment(environ: Mapping[str, str]) -> Environment:
    """What ``environ`` says.

    Raises:
        ConfigError: One of our variables, under either name, has an impossible value.
    """
    values: dict[str, Any] = {}
    read: list[str] = []
    for name, each in VARIABLES.items():
        ours, theirs = f"OCTAVO_{name}", f"VLLM_{name}"
        source = next((variable for variable in (ours, theirs) if environ.get(variable, "") != ""), None)
        if source is None:
            continue
        values[name] = each.check(source, environ[source])
        over = f" (over {theirs})" if source == ours and environ.get(theirs) else ""
        shown = "(hidden)" if name in SECRET else environ[source]
        read.append(f"{source}={shown}{over}")
    notes = [f"Read from the environment: {', '.join(read)}."] if read else []
    notes.extend(_unknown(environ))
    gib = values.get("CPU_KVCACHE_SPACE")
    return Environment(
        logging_level=values.get("LOGGING_LEVEL", "info"),
        log_format=values.get("LOG_FORMAT", "text"),
        configure_logging=bool(values.get("CONFIGURE_LOGGING", 1)),
        log_stats_interval_s=values.get("LOG_STATS_INTERVAL", 10.0),
        attention_backend=values.get("ATTENTION_BACKEND"),
        allow_long_max_model_len=bool(values.get("ALLOW_LONG_MAX_MODEL_LEN", 0)),
        torch_profiler_dir=values.get("TORCH_PROFILER_DIR"),
        api_key=values.get("API_KEY"),
        admin_api_key=values.get("ADMIN_API_KEY"),
        cpu_kv_cache_bytes=None if gib is None else int(gib * 2**30),
        notes=tuple(notes),
    )


def apply_environment(args: EngineArgs, environment: Environment) -> EngineArgs:
    """``args`` with what the environment says about settings that were left to us; ``auto`` was asked for, too."""
    changes: dict[str, Any] = {}
    if environment.attention_backend is not None and args.attention_backend is None:
        changes["attention_backend"] = environment.attention_backend
    if environment.allow_long_max_model_len and args.allow_long_max_model_len is None:
        changes["allow_long_max_model_len"] = True
    if environment.torch_profiler_dir is not None and args.torch_profiler_dir is None:
        changes["torch_profiler_dir"] = environment.torch_profiler_dir
    sized = args.kv_cache_memory_bytes is not None or args.num_gpu_blocks_override is not None
    if environment.cpu_kv_cache_bytes is not None and args.device != "cuda" and not sized:
        changes["kv_cache_memory_bytes"] = environment.cpu_kv_cache_bytes
    return replace(args, **changes) if changes else args


def _unknown(environ: Mapping[str, str]) -> list[str]:
    """A line about variables with our prefix or vLLM's that nothing reads."""
    lines: list[str] = []
    strangers = sorted(name for name in environ if name.startswith("VLLM_") and name[5:] not in VARIABLES)
    if strangers:
        lines.append(f"Set but without effect in Octavo: {', '.join(strangers)}.")
    for name in sorted(
        name for name in environ if name.startswith("OCTAVO_") and name[7:] not in (*VARIABLES, *ELSEWHERE)
    ):
        known = (*VARIABLES, *ELSEWHERE)
        lines.append(f"Unknown environment variable {name}.{did_you_mean(name[7:], known, 'OCTAVO_')}")
    return lines


def is_secret(variable: str) -> bool:
    """Whether a variable of the environment holds a key of the server."""
    return any(variable == prefix + name for prefix in ("OCTAVO_", "VLLM_") for name in SECRET)

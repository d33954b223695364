"""Flags that users bring along from vLLM and that are not settings of this engine, each with what to say about it.

Three answers are possible: the value asks for what happens anyway (accepted), the flag only hints at speed or memory
(one warning, then ignored), or it asks for something that is not done (an error that says what to do instead). Nothing
is swallowed in silence. Names are in the spelling of flags, without the leading dashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean, shorten


@dataclass(frozen=True, slots=True)
class KnownFlag:
    """A flag of vLLM that is not one of ours."""

    why: str
    """Completes "--x has no effect here: ..." of a hint, or "--x is not supported: ..."."""
    is_hint: bool = False
    takes_value: bool = True
    accepted: tuple[str, ...] = ()
    """Values that ask for what is done anyway."""


def _table(
    names: str, why: str, *accepted: str, is_hint: bool = False, takes_value: bool = True
) -> dict[str, KnownFlag]:
    return {name: KnownFlag(why, is_hint, takes_value, accepted) for name in names.split()}


_ONE_DEVICE = "this version runs on one device only"
_SERVER = "it is a flag of octavo serve"
_TOOLS = "tool calls are not supported yet"
_NO_COMPILER = "nothing is compiled ahead of time"

KNOWN_FLAGS: Mapping[str, KnownFlag] = {
    # What would change answers, memory or topology is refused.
    **_table(
        "pipeline-parallel-size pp data-parallel-size dp nnodes decode-context-parallel-size "
        "prefill-context-parallel-size",
        _ONE_DEVICE,
        "1",
    ),
    **_table("node-rank data-parallel-rank", _ONE_DEVICE, "0"),
    **_table("master-addr master-port data-parallel-address data-parallel-backend data-parallel-rpc-port", _ONE_DEVICE),
    **_table("enable-expert-parallel headless", _ONE_DEVICE, takes_value=False),
    **_table(
        "lora-modules max-loras max-lora-rank max-cpu-loras lora-dtype default-mm-loras",
        "LoRA adapters are not supported yet; merge the adapter into the checkpoint",
    ),
    **_table(
        "enable-lora",
        "LoRA adapters are not supported yet; merge the adapter into the checkpoint",
        takes_value=False,
    ),
    **_table(
        "speculative-config sc spec-method spec-model spec-tokens", "speculative decoding is not supported yet"
    ),
    **_table(
        "structured-outputs-config guided-decoding-backend", "structured outputs are not supported yet", "auto"
    ),
    **_table("tool-call-parser tool-parser-plugin tool-server", _TOOLS),
    **_table("enable-auto-tool-choice", _TOOLS, takes_value=False),
    **_table("reasoning-parser-plugin", "parsers are tables in octavo/frontend/reasoning.py"),
    **_table(
        "host port uds api-key admin-api-key root-path ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs "
        "allowed-origins allowed-methods allowed-headers uvicorn-log-level max-log-len shutdown-timeout "
        "chat-template-content-format response-role default-chat-template-kwargs otlp-traces-endpoint reasoning-parser",
        _SERVER,
    ),
    **_table("api-server-count", _SERVER, "1"),
    **_table(
        "enable-log-requests enable-log-outputs enable-force-include-usage enable-request-id-headers "
        "disable-uvicorn-access-log trust-request-chat-template disable-fastapi-docs allow-credentials "
        "return-tokens-as-token-ids",
        _SERVER,
        takes_value=False,
    ),
    **_table("middleware", "put a proxy in front of the server, or run octavo.server.app:build_app in a program"),
    **_table("collect-detailed-traces", "spans have no further detail"),
    **_table("h11-max-incomplete-event-size", "use --max-header-bytes", is_hint=True),
    **_table("h11-max-header-count", "use --max-header-count", is_hint=True),
    **_table("log-config-file", "use --log-format, OCTAVO_LOGGING_LEVEL and --uvicorn-log-level"),
    **_table("ssl-ciphers", "TLS has Python's defaults; put a proxy in front for more"),
    **_table("enable-ssl-refresh", "restart the server with the new certificate", takes_value=False),
    **_table("enable-prompt-tokens-details enable-server-load-tracking", "it is always on", is_hint=True,
             takes_value=False),
    **_table("disable-log-requests no-enable-log-requests", "requests are not logged unless --enable-log-requests asks",
             is_hint=True, takes_value=False),
    **_table("enable-tokenizer-info-endpoint", "there is no such route", takes_value=False),
    **_table("tokenizer-mode", "there is one kind of tokenizer, the fast one", "auto", "hf"),
    **_table("tokenizer-revision", "give --tokenizer a folder with the tokenizer that you want"),
    **_table("code-revision", "code of a model is taken from the revision that --revision names"),
    **_table("hf-token", "set the environment variable HF_TOKEN, so that the token does not show in process lists"),
    **_table("hf-config-path", "use --hf-overrides"),
    **_table("task", "use --runner and --convert", "auto", "generate"),
    **_table("limit-mm-per-prompt mm-processor-kwargs", "only text is supported yet"),
    **_table("allowed-local-media-path allowed-media-domains", "only text is supported yet"),
    **_table("cpu-offload-gb kv-offloading-size", "all weights and the KV cache stay on the device", "0", "0.0"),
    **_table("offload-group-size offload-prefetch-step offload-params", "weights stay on the device", "0"),
    **_table("offload-num-in-group", "weights stay on the device", "1"),
    **_table("enable-return-routed-experts", "routing is not reported", takes_value=False),
    **_table("profiler-config", "use --torch-profiler-dir"),
    **_table(
        "kv-offloading-backend kv-transfer-config kv-events-config", "the KV cache stays on the device of this engine"
    ),
    **_table("enable-sleep-mode", "sleeping is not supported yet", takes_value=False),
    **_table("scheduler-cls", "give an import path module:Class to --scheduling-policy"),
    **_table("worker-cls worker-extension-cls", "see docs/extending/executor.md", "auto"),
    **_table("attention-config quantization-config", "use --attention-backend and --quantization"),
    **_table("enable-prompt-embeds", "prompts are text or token ids", takes_value=False),
    **_table("model-loader-extra-config", "no loader here has options", "{}"),
    **_table("ignore-patterns", "only the files that a model needs are downloaded"),
    # Hints about speed, memory or looks: one warning.
    **_table(
        "optimization-level compilation-config cc cudagraph-capture-sizes max-cudagraph-capture-size "
        "cuda-graph-sizes max-seq-len-to-capture",
        _NO_COMPILER,
        is_hint=True,
    ),
    **_table("swap-space", "a preempted request is recomputed, not swapped", "0", is_hint=True),
    **_table("performance-mode", "batch limits are set by flags of their own", "balanced", is_hint=True),
    **_table(
        "max-num-partial-prefills max-long-partial-prefills",
        "use --long-prefill-token-threshold to keep long prompts from filling a step",
        "1",
        is_hint=True,
    ),
    **_table("max-parallel-loading-workers", "weights are streamed from one mapped file", is_hint=True),
    **_table("safetensors-load-strategy", "weights are always streamed from mapped files", is_hint=True),
    **_table(
        "disable-custom-all-reduce disable-nccl-for-dp-synchronization", _ONE_DEVICE, is_hint=True, takes_value=False
    ),
    **_table(
        "disable-async-output-proc disable-cascade-attn enable-flashinfer-autotune use-v2-block-manager "
        "scheduler-reserve-full-isl no-scheduler-reserve-full-isl calculate-kv-scales enable-mfu-metrics "
        "kv-cache-metrics enable-logging-iteration-details use-tqdm-on-load no-use-tqdm-on-load "
        "disable-hybrid-kv-cache-manager",
        "Octavo has no such switch",
        is_hint=True,
        takes_value=False,
    ),
}  # fmt: skip


def judge(flag: str, value: object, known: KnownFlag) -> str | None:
    """What to warn of, or None when the value asks for what is done anyway.

    Args:
        flag: As the user wrote it, for the message.
        value: None when it is not known or the flag takes none.
        known: What we know of it.

    Raises:
        ConfigError: The flag cannot be honoured.
    """
    if value is not None and str(value).lower() in known.accepted:
        return None
    if known.is_hint:
        return f"{flag} has no effect here: {known.why}."
    possible = f" (possible: {', '.join(known.accepted)})" if known.accepted else ""
    shown = "" if value is None else f" {shorten(str(value), 40)}"
    raise ConfigError(
        f"{flag}{shown} is not supported: {known.why}{possible}.", param=flag.lstrip("-").replace("-", "_")
    )


def drop_known_keywords(
    keywords: Mapping[str, object], ours: Iterable[str], warn: Callable[[str], None]
) -> dict[str, object]:
    """``keywords`` of a Python call without those of vLLM that have no effect here.

    None, False and empty values are how vLLM spells "not used": they are accepted for any flag that vLLM knows.

    Raises:
        ConfigError: A keyword is unknown, or known and not supported.
    """
    names = list(ours)
    kept: dict[str, object] = {}
    for name, value in keywords.items():
        if name in names:
            kept[name] = value
            continue
        known = KNOWN_FLAGS.get(name.replace("_", "-"))
        if known is None:
            raise ConfigError(f"unknown setting {name!r}." + did_you_mean(name, names), param=name)
        if value is None or value is False or value in ("", (), [], {}):
            continue
        message = judge(name, None if value is True else value, known)
        if message:
            warn(message)
    return kept

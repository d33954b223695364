"""Attention backend by name, and the choice for ``auto``.

Names of other engines are understood, so that their commands work. Third parties give an import path or use the entry
point group ``octavo.attention_backends``.
"""

from __future__ import annotations

from collections.abc import Mapping

from octavo.attention.backend import AttentionBackend, AttentionSpec, unsupported_direction
from octavo.errors import ConfigError
from octavo.utils.registry import Registry


def _spelling(name: str) -> str:
    """``flash-attn`` is FLASH_ATTN, and so is FLASH_ATTN_VLLM_V1 of older scripts."""
    return name.upper().replace("-", "_").removesuffix("_VLLM_V1")


BACKENDS = Registry(
    "attention backend",
    "attention_backend",
    "octavo.attention_backends",
    {
        "CPU_PAGED": "octavo.attention.cpu_paged:CpuPagedBackend",
        "TORCH_SDPA": "octavo.attention.torch_sdpa:TorchSdpaBackend",
        "TRITON_ATTN": "octavo.attention.triton:TritonBackend",
        "FLASH_ATTN": "octavo.attention.flash_attn:FlashAttnBackend",
        "FLEX_ATTENTION": "octavo.attention.flex:FlexBackend",
        "FLASHINFER": "octavo.attention.flashinfer:FlashInferBackend",
        "XFORMERS": "octavo.attention.xformers:XformersBackend",
        "ENCODER_SDPA": "octavo.attention.encoder:EncoderBackend",
    },
    aliases={
        "TRITON": "TRITON_ATTN",
        "CPU_ATTN": "CPU_PAGED",
        "SDPA": "TORCH_SDPA",
        "TORCH": "TORCH_SDPA",
        "TORCH_NATIVE": "TORCH_SDPA",
        "FLEX": "FLEX_ATTENTION",
        "FA3": "FLASH_ATTN",
    },
    normalise=_spelling,
)
AUTO_ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPU_PAGED", "TORCH_SDPA"),
    "cuda": ("FLASH_ATTN", "TRITON_ATTN", "TORCH_SDPA"),
}
"""Device type to the backends that ``auto`` asks first, fastest first; then all others follow. Measured on an H200
(``octavo attention --bench``, benchmarks/results): decode is the same kernel in the first two; prompts of 2048 to 10240
tokens run at 448 to 653 TFLOP/s with FlashAttention 3, at 280 to 381 with our own kernel. A backend can say by a class
method ``passed_over(spec)`` why it should only be taken if no other serves."""


def choose_backend(requested: str, spec: AttentionSpec, device_type: str) -> tuple[type[AttentionBackend], str]:
    """The backend to use and the reason in words.

    Args:
        requested: ``auto``, a name, another engine's name for it, or ``module:Class``.
        spec: What the layers ask for.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: The requested backend is unknown or cannot serve ``spec``, or no backend can; every candidate is
            listed with its reason.
    """
    if requested.lower() != "auto":
        backend: type[AttentionBackend] = BACKENDS.load(requested)
        reason = reason_against(backend, spec, device_type)
        if reason is None:
            return backend, f"asked for as {requested!r}"
        others = _candidates(spec, device_type, except_for=backend.name)
        raise ConfigError(
            f"attention backend {backend.name} cannot be used: {reason}. Others: {_describe(others)}.",
            param="attention_backend",
        )
    names = list(dict.fromkeys([*AUTO_ORDER.get(device_type, ()), *BACKENDS.names()]))
    slower: dict[type[AttentionBackend], str] = {}
    for name in names:  # one after the other: importing a backend for another device takes time
        found, reason = _candidate(name, spec, device_type)
        if reason is None and found is not None:
            slow: str | None = getattr(found, "passed_over", _never)(spec)
            if slow is None:
                why = f"the first of {', '.join(names)} that serves this model on {device_type}"
                return found, "; ".join([why, *slower.values()])
            slower[found] = f"not {name}: {slow}"
    if slower:
        return next(iter(slower)), f"no other of {', '.join(names)} serves this model on {device_type}"
    candidates = _candidates(spec, device_type)
    raise ConfigError(
        f"no attention backend serves this model on {device_type}: {_describe(candidates)}", param="attention_backend"
    )


def _never(_: AttentionSpec) -> None:
    """Most backends are never passed over."""


def _candidates(
    spec: AttentionSpec, device_type: str, except_for: str = ""
) -> dict[str, tuple[type[AttentionBackend] | None, str | None]]:
    """Name to class (None if it does not import) and the reason against it (None if it fits)."""
    return {name: _candidate(name, spec, device_type) for name in BACKENDS.names() if name != except_for}


def _candidate(name: str, spec: AttentionSpec, device_type: str) -> tuple[type[AttentionBackend] | None, str | None]:
    try:
        backend: type[AttentionBackend] = BACKENDS.load(name)
    except ConfigError as error:
        return None, error.message
    return backend, reason_against(backend, spec, device_type)


def reason_against(backend: type[AttentionBackend], spec: AttentionSpec, device_type: str) -> str | None:
    """Why a backend cannot serve ``spec``; None when it can."""
    return unsupported_direction(backend, spec) or backend.unsupported(spec, device_type)


def _describe(candidates: dict[str, tuple[type[AttentionBackend] | None, str | None]]) -> str:
    described = [f"{name}: {reason or 'usable'}" for name, (_, reason) in candidates.items()]
    return "; ".join(described)

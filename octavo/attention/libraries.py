"""Attention libraries that may be installed, behind one signature: which serves a spec, and why the others do not.

To answer that, nothing is imported but what ``auto`` would take: a library that was built for another torch is found
by trying, and must not end a start. Their functions are called with contiguous
keys and values, causally aligned at the end. Knows no pages. Measured on an H200 (2026-11-22): fa3-fwd 530-700 TFLOP/s,
torch's own 300.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.errors import ConfigError
from octavo.utils.text import shorten


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests of one call: queries and keys lie one request after another."""

    query_starts: Tensor
    """[R + 1] int32."""
    key_starts: Tensor
    """[R + 1] int32."""
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]


class Attend(Protocol):
    """``q [T, H, D]`` over ``k``, ``v`` ``[S, G, D]`` to ``[T, H, D]``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Library:
    """One way to compute attention of variable lengths."""

    name: str
    module: str
    """Its presence says that the library is installed."""
    function: str
    """Of the module; with a dot, an operator that the module registers with torch."""
    head_dims: tuple[int, ...] = ()
    """The only ones it has; empty: every multiple of 8 up to 256."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    has_window: bool = True
    has_softcap: bool = True
    is_winner: bool = False
    """Measured to be faster for prompts than the kernels of TRITON_ATTN."""
    least_capability: tuple[int, int] = (8, 0)
    greatest_capability: tuple[int, int] = (99, 0)

    def unsupported(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve ``spec`` here; None when it can."""
        if not is_installed(self.module):
            return f"{self.module} is not installed"
        if spec.dtype not in self.dtypes:
            return f"it has no {spec.dtype}"
        if self.head_dims and spec.head_dim not in self.head_dims:
            return f"it has no head size {spec.head_dim}"
        if spec.head_dim % 8 or spec.head_dim > 256:
            return f"head size {spec.head_dim} is not a multiple of 8 up to 256"
        if spec.sliding_window is not None and not self.has_window:
            return "it has no sliding window"
        if spec.has_sinks:
            return "it has no attention sinks"
        if spec.logit_softcap is not None and not self.has_softcap:
            return "it has no logit softcap"
        capability = device_capability()
        if capability is not None and not self.least_capability <= capability <= self.greatest_capability:
            return f"it is not made for GPUs of compute capability {capability[0]}.{capability[1]}"
        return None


FLASH_LIBRARIES = (
    Library("FlashAttention 3", "flash_attn_interface", "flash_attn_varlen_func", is_winner=True,
            least_capability=(9, 0), greatest_capability=(9, 9)),
    # Its Python wrapper is a custom operator, whose first call imports torch's compiler: seconds of a start.
    Library("FlashAttention 3 (fa3-fwd)", "fa3_fwd._C", "fa3_fwd.fwd",
            head_dims=(64, 96, 128, 192, 256), dtypes=(torch.bfloat16,), has_window=False, is_winner=True,
            least_capability=(9, 0), greatest_capability=(9, 9)),
    Library("FlashAttention 4", "flash_attn.cute", "flash_attn_varlen_func", least_capability=(9, 0)),
    Library("FlashAttention 2", "flash_attn.flash_attn_interface", "flash_attn_varlen_func"),
    Library("torch's varlen_attn", "torch.nn.attention.varlen", "varlen_attn", has_softcap=False),
)  # fmt: skip
"""Fastest first. torch's own is always there; it is slower than the kernels of TRITON_ATTN."""
BROKEN = (ImportError, OSError, AttributeError, RuntimeError)
"""What importing a library raises that does not fit what else is installed."""
XFORMERS = Library("xFormers", "xformers.ops", "memory_efficient_attention_forward", has_softcap=False)


def find_flash(spec: AttentionSpec) -> tuple[Library | None, str]:
    """The first of FLASH_LIBRARIES that serves ``spec``, or None; and the reasons against those before it."""
    reasons: list[str] = []
    for library in FLASH_LIBRARIES:
        reason = library.unsupported(spec)
        if reason is None and library.is_winner:
            try:
                load_flash(library, spec)
            except BROKEN as error:
                reason = f"it is installed, but cannot be loaded ({_line(error)})"
        if reason is None:
            return library, "; ".join(reasons)
        reasons.append(f"{library.name}: {reason}")
    return None, "; ".join(reasons)


def load_or_refuse(name: str, load: Callable[[], Attend]) -> Attend:
    """What ``load`` finds, for a library that was asked for.

    Raises:
        ConfigError: It is installed, but broken.
    """
    try:
        return load()
    except BROKEN as error:
        raise ConfigError(
            f"attention backend: {name} is installed, but cannot be loaded ({_line(error)}): install one that was "
            f"built for torch {torch.__version__}, or choose another backend",
            param="attention_backend",
        ) from error


def _line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()), 200)


def is_installed(module: str) -> bool:
    """Whether ``module`` could be imported; imports at most the packages that hold it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def device_capability() -> tuple[int, int] | None:
    """Of the present GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def load_flash(library: Library, spec: AttentionSpec) -> Attend:
    """Import a member of FLASH_LIBRARIES; its function takes what its signature names.

    Raises:
        ImportError: It is installed, but broken.
    """
    function, known = _find_function(library)
    group = spec.num_heads // spec.num_kv_heads
    is_torch = library.module.startswith("torch.")
    fixed = _fixed_arguments(spec, known, is_torch=is_torch)
    for name in fixed:
        if name not in known and name != "enable_gqa":
            raise ImportError(f"{library.name} does not know {name}: this version of it cannot be used")
    scale_name = next((name for name in ("softmax_scale", "scale") if name in known), None)
    if scale_name is not None:
        fixed[scale_name] = spec.scale
    factor = 1.0 if scale_name is not None else spec.scale * spec.head_dim**0.5
    is_repeated = is_torch and "enable_gqa" not in known and group > 1
    fixed = {name: value for name, value in fixed.items() if name in known}

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        if is_repeated:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if factor != 1.0:
            q = q * factor
        longest = max(lengths.query_lens), max(lengths.key_lens)
        options = {
            "cu_seq_q": lengths.query_starts, "cu_seq_k": lengths.key_starts, "max_q": longest[0], "max_k": longest[1],
            "cu_seqlens_q": lengths.query_starts, "cu_seqlens_k": lengths.key_starts, "max_seqlen_q": longest[0],
            "max_seqlen_k": longest[1], **fixed,
        }  # fmt: skip
        result = function(q, k, v, **{name: value for name, value in options.items() if name in known})
        return result[0] if isinstance(result, tuple) else result

    return attend


def _fixed_arguments(spec: AttentionSpec, known: Collection[str], *, is_torch: bool) -> dict[str, Any]:
    """What every call says of a model's layers, by the names that a library has for it."""
    window = (-1 if spec.sliding_window is None else spec.sliding_window - 1, 0)
    if is_torch:
        return {"window_size": window, "enable_gqa": True}
    fixed: dict[str, Any] = {"is_causal" if "is_causal" in known else "causal": True}
    if spec.sliding_window is not None:
        fixed["window_size"] = window
    if spec.logit_softcap is not None:
        fixed["softcap"] = spec.logit_softcap
    if "num_splits" in known:
        fixed["num_splits"] = 1  # prompts are long enough to share the device
    return fixed


def _find_function(library: Library) -> tuple[Callable[..., Any], Collection[str]]:
    """What to call, and the names of its arguments."""
    module = importlib.import_module(library.module)
    namespace, _, operator = library.function.partition(".")
    if not operator:
        function: Callable[..., Any] = getattr(module, library.function)
        return function, inspect.signature(function).parameters
    try:
        overload: Any = getattr(getattr(torch.ops, namespace), operator).default
    except AttributeError:
        raise ImportError(f"{library.module} registers no operator {library.function}") from None
    return overload, [argument.name for argument in overload._schema.arguments]


def load_xformers(spec: AttentionSpec) -> Attend:
    """xFormers' variable-length attention; a head group becomes a dimension of its own.

    Raises:
        ImportError: It is installed, but broken.
    """
    ops: Any = importlib.import_module("xformers.ops")
    biases: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    group = spec.num_heads // spec.num_kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        bias = biases.BlockDiagonalCausalFromBottomRightMask.from_seqlens(lengths.query_lens, lengths.key_lens)
        if spec.sliding_window is not None:
            bias = bias.make_local_attention(spec.sliding_window)
        queries = q.unflatten(1, (spec.num_kv_heads, group))[None]  # [1, T, G, H / G, D]
        keys, values = (each[None, :, :, None].expand(-1, -1, -1, group, -1) for each in (k, v))
        result = ops.memory_efficient_attention_forward(queries, keys, values, attn_bias=bias, scale=spec.scale)
        return result[0].flatten(1, 2)

    return attend

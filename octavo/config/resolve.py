"""The only place where ``auto`` becomes a value. Pure: the same arguments give the same answer, nothing is read.

``resolve()`` runs before anything is loaded, ``kv_cache_size.py`` after the worker has counted its memory. Both return
the ``Decision``s that explain every value which the user did not give. Knows no torch and no registry: which attention
backends exist and fit is decided by ``attention/registry.py``, which gives its own reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from octavo.config.args import EngineArgs
from octavo.config.engine import Decision, EngineConfig
from octavo.config.hardware import Hardware
from octavo.config.model import ModelConfig
from octavo.config.pooling import StoredPooling, in_one_piece, resolve_pooling
from octavo.config.sections import (
    CacheConfig,
    DeviceConfig,
    FrontendConfig,
    LoadConfig,
    ParallelConfig,
    SchedulerConfig,
)
from octavo.config.setting import Setting
from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean, format_count

GIB = 2**30
DEFAULT_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64
"""One block and head is then one bulk copy of the attention kernels. Measured on an H200 (2026-11-22): blocks of 16
cost decode up to 6 %, of 128 gain nothing there."""
CPU_MAX_NUM_SEQS = 128
CPU_MAX_NUM_BATCHED_TOKENS = 512
"""A step of a small model on few cores should not hold up running answers for much longer than half a second."""
LARGE_GPU_BYTES = 70 * GIB
DEFAULT_MAX_QUEUED_REQS = 4096
DEFAULT_MAX_QUEUED_TOKENS = 64 * 2**20
FAST_BFLOAT16 = "amx_bf16"
FAST_INT8 = frozenset({"avx2", "avx512"})
"""Where the compiled int8 product has been measured against float32: two to four times as fast (docs/log.md)."""
DTYPE_SPELLINGS = {"half": "float16", "float": "float32"}
SAMPLING_DEFAULTS: Mapping[str, Setting] = {
    "temperature": Setting("number", "", "", low=0),
    "top_p": Setting("number", "", "", low=0, above_low=True, high=1),
    "top_k": Setting("count", "", "", low=-1),
    "min_p": Setting("number", "", "", low=0, high=1),
    "repetition_penalty": Setting("number", "", "", low=0, above_low=True),
    "presence_penalty": Setting("number", "", "", low=-2, high=2),
    "frequency_penalty": Setting("number", "", "", low=-2, high=2),
    "max_tokens": Setting("count", "", "", low=1),
}
"""What generation_config.json and its override may set; the bounds are those of ``SamplingParams``."""


class Located(Protocol):
    """``checkpoint.locate.LocatedModel``, as far as it matters here."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Any: ...
    @property
    def format(self) -> str: ...


def resolve(
    args: EngineArgs, located: Located, model: ModelConfig, hardware: Hardware, stored: StoredPooling | None = None
) -> tuple[EngineConfig, list[Decision]]:
    """Settle everything that does not need the loaded model.

    Args:
        args: What the user asked for.
        located: Where the model is.
        model: Its config.
        hardware: What the machine has.
        stored: What its files say of pooling; None for a model that only generates.

    Raises:
        ConfigError: Settings contradict each other, the model, or the machine.
    """
    notes: list[Decision] = []
    stored = stored or StoredPooling()
    pooling = resolve_pooling(args, stored, model.architecture, notes)
    if pooling is not None and pooling.is_encoder:
        args = in_one_piece(args, notes)
    is_packed = pooling is None and located.format == "gguf" and "gguf_stored_as" in model.hf
    device = _device(args, model, hardware, is_packed, notes)
    max_model_len = _max_model_len(args, model, stored, notes)
    scheduler = _scheduler(args, hardware, max_model_len, notes)
    config = EngineConfig(
        model=model,
        load=_load(args, located, notes),
        device=device,
        cache=_cache(args, device, notes),
        scheduler=scheduler,
        parallel=ParallelConfig(
            tensor_parallel_size=args.tensor_parallel_size, executor=args.distributed_executor_backend
        ),
        frontend=_frontend(args, located, model, notes),
        pooling=pooling,
    )
    return config, notes


def _device(
    args: EngineArgs, model: ModelConfig, hardware: Hardware, is_packed: bool, notes: list[Decision]
) -> DeviceConfig:
    is_cpu = hardware.device_type == "cpu"
    if args.device not in ("auto", hardware.device_type):
        raise ConfigError(f"device is {args.device}, but the device found is {hardware.device_type}", param="device")
    if args.device == "auto":
        notes.append(Decision("device", hardware.device_type, f"found {hardware.name}"))
    num_threads = args.num_threads
    if num_threads is None:
        num_threads = hardware.num_threads
        notes.append(Decision("num_threads", str(num_threads), "cores that this process may use"))
    depth = 2 if args.async_scheduling else 1
    if args.async_scheduling is None:
        depth = 1 if is_cpu else 2
        reason = "the CPU that plans also computes" if is_cpu else "planning overlaps with the device"
        notes.append(Decision("async_scheduling", "off" if depth == 1 else "on", reason))
    dtype = _dtype(args, model, hardware, notes)
    is_native = is_cpu and hardware.compiles_kernels and not FAST_INT8.isdisjoint(hardware.features)
    prefers_int8 = is_packed and is_native and args.dtype == "auto" and dtype == "float32" and model.moe is None
    return DeviceConfig(
        device_type=hardware.device_type,
        dtype=dtype,
        attention_backend=args.attention_backend or "auto",
        quantization=_quantization(args, model, prefers_int8, notes),
        num_threads=num_threads,
        enforce_eager=args.enforce_eager,
        depth=depth,
        logits_processors=args.logits_processors,
    )


def _dtype(args: EngineArgs, model: ModelConfig, hardware: Hardware, notes: list[Decision]) -> str:
    if args.dtype != "auto":
        dtype = DTYPE_SPELLINGS.get(args.dtype, args.dtype)
        if dtype == "bfloat16" and hardware.device_type != "cpu" and not hardware.supports_bfloat16:
            raise ConfigError(
                f"dtype is bfloat16, which {hardware.name} cannot compute in: use float16 or float32", param="dtype"
            )
        return dtype
    if hardware.device_type == "cpu":
        # Measured on 2 cores with AVX512-BF16 and without AMX: linear layers in bfloat16 take 1.2 times as long as
        # in float32 at one row and 1.5 times at 1024 rows (2026-11-22).
        if FAST_BFLOAT16 in hardware.features and model.dtype == "bfloat16":
            dtype, reason = "bfloat16", "the checkpoint's, and this CPU has matrix units for it (AMX)"
        else:
            dtype, reason = "float32", f"no matrix units for other types in this CPU (the checkpoint is {model.dtype})"
    elif model.dtype == "bfloat16" and not hardware.supports_bfloat16:
        dtype, reason = "float16", f"{hardware.name} has no bfloat16, which the checkpoint is in"
    elif model.dtype == "float32":
        dtype = "bfloat16" if hardware.supports_bfloat16 else "float16"
        reason = "half the memory of the checkpoint's float32; --dtype float32 keeps it"
    else:
        dtype, reason = model.dtype, "the checkpoint's"
    notes.append(Decision("dtype", dtype, reason))
    return dtype


def _quantization(args: EngineArgs, model: ModelConfig, prefers_int8: bool, notes: list[Decision]) -> str:
    in_checkpoint = None
    if model.quantization is not None:
        in_checkpoint = str(model.quantization.get("quant_method", "unknown")).lower()
    asked = args.quantization or "auto"
    asked = asked if ":" in asked else asked.lower()
    if asked != "auto":
        if in_checkpoint is not None and asked != in_checkpoint:
            raise ConfigError(
                f"quantization is {asked}, but the checkpoint's weights are stored as {in_checkpoint}: "
                f"leave it out or give {in_checkpoint}",
                param="quantization",
            )
        return asked
    if in_checkpoint is not None:
        notes.append(Decision("quantization", in_checkpoint, "the checkpoint's"))
        return in_checkpoint
    if prefers_int8:
        stored = model.hf["gguf_stored_as"]
        reason = f"most weights of the file are {stored} already; --quantization none or --dtype float32 for float32"
        notes.append(Decision("quantization", "int8", reason))
        return "int8"
    notes.append(Decision("quantization", "none", "the checkpoint has plain weights"))
    return "none"


def _max_model_len(args: EngineArgs, model: ModelConfig, stored: StoredPooling, notes: list[Decision]) -> int:
    trained = stored.num_positions or model.max_length
    if args.max_model_len is None or args.max_model_len == "auto":
        reason = "what the model was trained for"
        default = trained
        if stored.max_seq_length is not None and stored.max_seq_length < trained:
            default, reason = stored.max_seq_length, f"what its authors recommend; up to {trained} with --max-model-len"
        if args.max_model_len == "auto":
            reason += ", to be fitted to memory"
        notes.append(Decision("max_model_len", format_count(default), reason))
        return default
    wanted = int(args.max_model_len)
    if wanted <= trained:
        return wanted
    if not args.allow_long_max_model_len:
        raise ConfigError(
            f"max_model_len is {format_count(wanted)}, but the model was trained for {format_count(trained)} tokens: "
            f"give at most {trained}. To try beyond, where answers may be nonsense, add --allow-long-max-model-len.",
            param="max_model_len",
        )
    notes.append(
        Decision("max_model_len", format_count(wanted), f"asked for, beyond the trained {format_count(trained)}")
    )
    return wanted


def _scheduler(args: EngineArgs, hardware: Hardware, max_model_len: int, notes: list[Decision]) -> SchedulerConfig:
    is_cpu = hardware.device_type == "cpu"
    is_large = hardware.total_memory_bytes >= LARGE_GPU_BYTES
    kind = "a CPU" if is_cpu else f"a GPU with {'at least' if is_large else 'less than'} 70 GiB"
    max_num_seqs, max_tokens = args.max_num_seqs, args.max_num_batched_tokens
    if max_tokens is None:
        max_tokens = CPU_MAX_NUM_BATCHED_TOKENS if is_cpu else 8192 if is_large else 2048
        reason = f"default of {kind}"
        if not args.enable_chunked_prefill and max_tokens < max_model_len:
            max_tokens, reason = max_model_len, "a whole prompt must fit into a step without chunked prefill"
        if max_num_seqs is not None and max_tokens < max_num_seqs:
            max_tokens, reason = max_num_seqs, "at least one token for each of max_num_seqs"
        notes.append(Decision("max_num_batched_tokens", format_count(max_tokens), reason))
    if max_num_seqs is None:
        default = CPU_MAX_NUM_SEQS if is_cpu else 1024 if is_large else 256
        max_num_seqs = min(default, max_tokens)
        reason = f"default of {kind}" if max_num_seqs == default else "one token each fills max_num_batched_tokens"
        notes.append(Decision("max_num_seqs", format_count(max_num_seqs), reason))
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_tokens}) is less than max_num_seqs ({max_num_seqs}), but a step needs a "
            "token for each running request: raise the one or lower the other",
            param="max_num_batched_tokens",
        )
    if not args.enable_chunked_prefill and max_tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens ({max_tokens}) is less than max_model_len ({max_model_len}), so that a long "
            "prompt would never run without chunked prefill: raise it, lower max_model_len, or leave chunked prefill "
            "on",
            param="max_num_batched_tokens",
        )
    if not args.enable_chunked_prefill and args.long_prefill_token_threshold:
        raise ConfigError(
            f"long_prefill_token_threshold ({args.long_prefill_token_threshold}) cuts prompts into chunks, but chunked "
            "prefill is off: leave out one of the two",
            param="long_prefill_token_threshold",
        )
    return SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        policy=args.scheduling_policy,
        max_num_queued_reqs=args.max_num_queued_reqs or DEFAULT_MAX_QUEUED_REQS,
        max_num_queued_tokens=args.max_num_queued_tokens or DEFAULT_MAX_QUEUED_TOKENS,
        tenant_weights=_tenant_weights(args),
    )


def _tenant_weights(args: EngineArgs) -> dict[str, float]:
    if args.tenant_weights and args.scheduling_policy in ("fcfs", "priority"):
        raise ConfigError(
            f"tenant_weights is given, but scheduling_policy is {args.scheduling_policy}, which knows no tenants: use "
            "--scheduling-policy fair",
            param="tenant_weights",
        )
    weight = Setting("number", "", "", low=0, above_low=True, high=1e6)
    return {tenant: weight.check(f"tenant_weights[{tenant!r}]", value) for tenant, value in args.tenant_weights.items()}


def _load(args: EngineArgs, located: Located, notes: list[Decision]) -> LoadConfig:
    load_format = args.load_format
    if located.format == "none" and load_format in ("auto", "safetensors", "gguf", "pt"):
        raise ConfigError(
            f"{located.path} holds a config.json but no weights: for random ones, add --load-format dummy",
            param="load_format",
        )
    if load_format == "auto":
        load_format = located.format
        notes.append(Decision("load_format", load_format, "what the files are"))
    elif load_format in ("safetensors", "gguf", "pt") and load_format != located.format:
        raise ConfigError(
            f"load_format is {load_format}, but {located.path} holds {located.format}: leave it out",
            param="load_format",
        )
    return LoadConfig(
        model=args.model or located.name,
        path=str(located.path),
        load_format=load_format,
        revision=args.revision,
        seed=args.seed,
        model_impl="octavo" if args.model_impl == "vllm" else args.model_impl,
    )


def _cache(args: EngineArgs, device: DeviceConfig, notes: list[Decision]) -> CacheConfig:
    block_size = args.block_size
    if block_size is None and device.device_type == "cpu":
        block_size = DEFAULT_BLOCK_SIZE
        notes.append(Decision("block_size", str(block_size), "smallest: most prefixes are shared"))
    elif block_size is None:
        block_size = GPU_BLOCK_SIZE
        notes.append(Decision("block_size", str(block_size), "what the attention kernels load at once"))
    kv_cache_dtype = args.kv_cache_dtype
    if kv_cache_dtype == "auto":
        kv_cache_dtype = device.dtype
        notes.append(Decision("kv_cache_dtype", device.dtype, "as dtype"))
    return CacheConfig(
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=args.enable_prefix_caching,
        prefix_caching_hash_algo=args.prefix_caching_hash_algo,
        memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        num_blocks_override=args.num_gpu_blocks_override,
    )


def _frontend(args: EngineArgs, located: Located, model: ModelConfig, notes: list[Decision]) -> FrontendConfig:
    defaults = dict[str, Any]()
    if args.generation_config == "auto":
        for name, value in model.generation_defaults.items():
            if name in SAMPLING_DEFAULTS and value is not None:
                defaults[name] = SAMPLING_DEFAULTS[name].check(f"generation_config.json: {name}", value)
    overrides = dict(args.override_generation_config)
    if "max_new_tokens" in overrides:
        overrides["max_tokens"] = overrides.pop("max_new_tokens")
    for name, value in overrides.items():
        if name not in SAMPLING_DEFAULTS:
            raise ConfigError(
                f"override_generation_config has {name!r}, but can only set {', '.join(SAMPLING_DEFAULTS)}."
                + did_you_mean(name, SAMPLING_DEFAULTS),
                param="override_generation_config",
            )
        defaults[name] = SAMPLING_DEFAULTS[name].check(f"override_generation_config[{name!r}]", value)
    if defaults and args.generation_config == "auto":
        shown = ", ".join(f"{name}={value}" for name, value in defaults.items())
        notes.append(Decision("sampling_defaults", shown, "the model's, unless a request says otherwise"))
    return FrontendConfig(
        served_model_names=args.served_model_name or (args.model or located.name,),
        tokenizer=args.tokenizer or str(located.path),
        skip_tokenizer_init=args.skip_tokenizer_init,
        chat_template=args.chat_template,
        max_logprobs=model.vocab_size if args.max_logprobs == -1 else args.max_logprobs,
        logprobs_mode=args.logprobs_mode,
        sampling_defaults=defaults,
        seed=args.seed,
        stream_interval=args.stream_interval,
    )

"""The only place where ``auto`` becomes a value. Pure: the same arguments give the same answer, nothing is read.

``resolve()`` runs before anything is loaded, ``size_kv_cache()`` after the worker has counted its memory. Both return
the ``Decision``s that explain every value which the user did not give. Knows no torch and no registry: which attention
backends exist and fit is decided by ``attention/registry.py``, which gives its own reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from octavo.utils.text import did_you_mean, format_bytes, format_count, plural

GIB = 2**30
DEFAULT_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64
"""One block and head is then one bulk copy of the attention kernels. Measured on an H200 (2026-11-22): blocks of 16
cost decode up to 6 %, of 128 gain nothing there."""
CPU_MAX_NUM_SEQS = 128
CPU_MAX_NUM_BATCHED_TOKENS = 512
"""A step of a small model on few cores should not hold up running answers for much longer than half a second."""
CPU_KV_CACHE_BYTES = 4 * GIB
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


class KVGeometry(Protocol):
    """``kv_spec.KVCacheSpec``, as far as it matters here."""

    @property
    def block_size(self) -> int: ...
    @property
    def bytes_per_block(self) -> int: ...
    def blocks_for_tokens(self, num_tokens: int) -> int: ...


class MemoryNumbers(Protocol):
    """``executor.executor.MemoryReport``, as far as it matters here."""

    @property
    def kv_spec(self) -> KVGeometry: ...
    @property
    def weights_bytes(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...
    @property
    def available_kv_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """The KV cache that was settled on."""

    num_blocks: int
    """Block 0, the null block, included."""
    num_tokens: int
    """That it can hold."""
    max_concurrency: float
    """Requests of full length that fit at once."""
    config: EngineConfig
    """With ``scheduler.max_model_len`` fitted when the user said ``auto``."""
    decisions: list[Decision]


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


def size_kv_cache(args: EngineArgs, config: EngineConfig, report: MemoryNumbers) -> KVCacheSize:
    """Number of KV cache blocks, and the context length where the user left it to memory.

    Raises:
        ConfigError: Not even one request of full length fits; names the largest length that does.
    """
    spec, notes = report.kv_spec, list[Decision]()
    if spec.bytes_per_block == 0:
        return _free_blocks(config, spec)
    per_block, wanted_len = spec.bytes_per_block, config.scheduler.max_model_len
    need_full = (spec.blocks_for_tokens(wanted_len) + 1) * per_block
    budget, why, flag = _kv_budget(args, config, report, need_full)
    num_blocks = budget // per_block
    usable = num_blocks - 1
    max_model_len = wanted_len
    if usable < spec.blocks_for_tokens(wanted_len):
        fits = _longest_that_fits(spec, usable, wanted_len)
        if args.max_model_len != "auto" or fits < 1:
            raise ConfigError(_too_small(config, report, budget, need_full, fits, flag), param="max_model_len")
        max_model_len = fits
        notes.append(
            Decision("max_model_len", format_count(fits), f"the longest that fits into {format_bytes(budget)} of cache")
        )
        config = replace(config, scheduler=replace(config.scheduler, max_model_len=fits))
    # In texts of full length: one with windows holds less than a block per block_size tokens and layer.
    in_full = -(-max_model_len // spec.block_size)
    num_tokens = usable * spec.block_size * in_full // spec.blocks_for_tokens(max_model_len)
    notes.append(
        Decision(
            "num_blocks",
            format_count(num_blocks),
            f"{format_bytes(num_blocks * per_block)} = {format_count(num_tokens)} tokens: {why}",
        )
    )
    return KVCacheSize(num_blocks, num_tokens, usable / spec.blocks_for_tokens(max_model_len), config, notes)


def _free_blocks(config: EngineConfig, spec: KVGeometry) -> KVCacheSize:
    """Blocks for a model that keeps nothing: the scheduler counts them, but they hold no memory."""
    limits = config.scheduler
    in_flight = limits.max_num_batched_tokens // spec.block_size + limits.max_num_seqs
    at_least = spec.blocks_for_tokens(limits.max_model_len)
    # A step's requests end with it, so those of the steps in flight and of the one being planned exist at once.
    usable = max(at_least, (config.device.depth + 1) * in_flight)
    reason = "an encoder keeps no keys and values: blocks count requests, and take no memory"
    return KVCacheSize(
        num_blocks=usable + 1,
        num_tokens=usable * spec.block_size,
        max_concurrency=usable / at_least,
        config=config,
        decisions=[Decision("num_blocks", format_count(usable + 1), reason)],
    )


# --------------------------------------------------------------------------------------------------- before loading


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
        attention_backend=args.attention_backend,
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
    trained = stored.num_positions or model.max_position_embeddings
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
    )


# ---------------------------------------------------------------------------------------------------- after loading


def _kv_budget(args: EngineArgs, config: EngineConfig, report: MemoryNumbers, need_full: int) -> tuple[int, str, str]:
    """Bytes for the cache, why so many, and the flag that changes it."""
    available, per_block = report.available_kv_bytes, report.kv_spec.bytes_per_block
    if args.num_gpu_blocks_override is not None:
        asked, flag = args.num_gpu_blocks_override * per_block, "num_gpu_blocks_override"
    elif args.kv_cache_memory_bytes is not None:
        asked, flag = args.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    else:
        if config.device.device_type != "cpu":
            return available, "all that is free below the ceiling of gpu_memory_utilization", "gpu_memory_utilization"
        wanted = max(CPU_KV_CACHE_BYTES, need_full)
        if wanted <= available:
            return wanted, "default of a CPU; --kv-cache-memory-bytes changes it", "kv_cache_memory_bytes"
        return available, "all that is free below the ceiling of gpu_memory_utilization", "gpu_memory_utilization"
    if asked > available:
        raise ConfigError(
            f"{flag} asks for {format_bytes(asked)} of KV cache, but only {format_bytes(available)} are free beside "
            f"{format_bytes(report.weights_bytes)} of weights and {format_bytes(report.activation_bytes)} of working "
            "memory: ask for less, or free memory",
            param=flag,
        )
    return asked, f"asked for by {flag}", flag


def _longest_that_fits(spec: KVGeometry, usable_blocks: int, upper: int) -> int:
    """Most tokens of one request whose blocks number at most ``usable_blocks``; 0 when none."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if spec.blocks_for_tokens(middle) <= usable_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _too_small(config: EngineConfig, report: MemoryNumbers, budget: int, need_full: int, fits: int, flag: str) -> str:
    wanted = config.scheduler.max_model_len
    spelled = "--" + flag.replace("_", "-")
    remedies = [f"--max-model-len {fits} (or auto)"] if fits > 0 else []
    remedies.append(
        f"a higher {spelled}" if flag != "gpu_memory_utilization" else f"free memory, or a higher {spelled}"
    )
    if config.cache.kv_cache_dtype == "float32":
        remedies.append("--kv-cache-dtype bfloat16, which halves it")
    largest = f"The longest that fits is {plural(fits, 'token')}. " if fits > 0 else "Not even one block fits. "
    return (
        f"the KV cache has room for {format_bytes(max(budget, 0))}, but one request of max_model_len "
        f"({format_count(wanted)} tokens) needs {format_bytes(need_full)} (weights take "
        f"{format_bytes(report.weights_bytes)}, working memory {format_bytes(report.activation_bytes)}). "
        f"{largest}Use {'; '.join(remedies)}."
    )

"""EngineArgs: everything a user may set, under the names that users of vLLM know.

The same dataclass feeds the command line (``flags.py``), ``LLM(...)``'s keywords and the reference page. It is what was
*asked for*: ``auto`` and None still stand in it, and nothing here looks at a model or a machine. ``resolve.py`` turns
it into an ``EngineConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from octavo.config.setting import setting, settings_of
from octavo.errors import ConfigError

MODEL, MEMORY, SCHEDULING, COMPUTE, FRONTEND = (
    "Model", "KV cache and memory", "Scheduling", "Computation", "Tokens and sampling",
)  # fmt: skip
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What was asked for. Values may be given as text, as on the command line (``max_model_len="16K"``).

    Raises:
        ConfigError: A value is impossible whatever the model and the machine; ``param`` names the field.
    """

    model: str | None = setting(
        None, "text", MODEL,
        "The model: a folder with safetensors, a GGUF file, a Hugging Face name, or the alias smollm2-135m, which is "
        "also the default.",
        optional=True,
    )  # fmt: skip
    served_model_name: tuple[str, ...] = setting(
        (), "names", MODEL, "Name or names under which the model is shown to clients. Default: the model as given."
    )
    tokenizer: str | None = setting(
        None, "text", MODEL,
        "Folder or GGUF file to take the tokenizer from. Default: the model's own.", optional=True,
    )  # fmt: skip
    skip_tokenizer_init: bool = setting(
        False, "switch", MODEL, "Load no tokenizer: prompts must be token ids and answers carry no text."
    )
    revision: str | None = setting(
        None, "text", MODEL, "Branch, tag or commit of the model on the Hugging Face hub.", optional=True
    )
    download_dir: str | None = setting(
        None, "text", MODEL, "Folder for downloaded models. Default: the Hugging Face cache.", optional=True
    )
    load_format: str = setting(
        "auto", "text", MODEL,
        "How the weights are stored: auto looks at the files; pt is pytorch_model.bin, of which only tensors are read; "
        "dummy makes random weights of the right shapes.",
        choices=("auto", "safetensors", "gguf", "pt", "dummy"), open_choices=True,
    )  # fmt: skip
    dtype: str = setting(
        "auto", "text", MODEL,
        "Type of weights and activations. auto: the checkpoint's on a GPU, float32 on a CPU.",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )  # fmt: skip
    quantization: str | None = setting(
        None, "text", MODEL,
        "How linear layers store their weights: a method's name, or none. Default: as the checkpoint says.",
        choices=("auto", "none"), open_choices=True, optional=True, short=("-q",),
    )  # fmt: skip
    max_model_len: int | str | None = setting(
        None, "count", MODEL,
        "Longest context, prompt and answer together, in tokens. Default: what the model was trained for; auto (or "
        "-1): the longest of that which fits into memory.",
        choices=("auto",), low=-1, high=INT32_MAX, optional=True,
    )  # fmt: skip
    allow_long_max_model_len: bool | None = setting(
        None, "switch", MODEL,
        "Let --max-model-len exceed what the model was trained for. Answers past that length may be nonsense. Default: "
        "off, or what OCTAVO_ALLOW_LONG_MAX_MODEL_LEN says.",
        optional=True,
    )  # fmt: skip
    hf_overrides: Mapping[str, Any] = setting(
        {}, "table", MODEL, "Entries that replace those of the model's config.json, as JSON."
    )
    model_impl: str = setting(
        "auto", "text", MODEL,
        "Whose code of the model runs: octavo, transformers (needs that package), or auto: Octavo's where it has the "
        "model, else that of transformers.",
        choices=("auto", "octavo", "vllm", "transformers"),
    )  # fmt: skip
    runner: str = setting(
        "auto", "text", MODEL,
        "What the model is run for: generate text, or pooling (embeddings, scores, classes). auto: by its files.",
        choices=("auto", "generate", "pooling"),
    )  # fmt: skip
    convert: str = setting(
        "auto", "text", MODEL,
        "Use a model that generates for something else: embed, or classify. auto and none: as it is.",
        choices=("auto", "none", "embed", "classify"),
    )  # fmt: skip
    pooler_config: Mapping[str, Any] = setting(
        {}, "table", MODEL,
        'How a pooling model makes its vectors, as JSON: {"pooling_type": "MEAN", "normalize": true}. Default: as its '
        "files say.",
    )  # fmt: skip
    trust_remote_code: bool = setting(
        False,
        "switch",
        MODEL,
        "Run Python code that comes with the checkpoint, where neither Octavo has the model, or --model-impl is "
        "transformers. Such code can do anything on this machine: read it first. Off, none of it runs or is fetched.",
    )

    gpu_memory_utilization: float = setting(
        0.92, "number", MEMORY,
        "Share of the device's whole memory that this engine may use, weights included: a ceiling, never an amount "
        "to be reached. On a CPU it is the share of the machine's memory.",
        low=0, above_low=True, high=1,
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = setting(
        None, "count", MEMORY,
        "Size of the KV cache, such as 4G. Default: what is free below the ceiling, on a CPU at most 4 GiB.",
        low=1, high=2**50, optional=True,
    )  # fmt: skip
    num_gpu_blocks_override: int | None = setting(
        None, "count", MEMORY, "Number of KV cache blocks, given outright. For tests.", low=2, high=INT32_MAX,
        optional=True,
    )  # fmt: skip
    block_size: int | None = setting(
        None, "count", MEMORY, "Tokens per KV cache block, a multiple of 16. Default: 64 on a GPU, 16 on a CPU.",
        low=16, high=256, optional=True,
    )  # fmt: skip
    kv_cache_dtype: str = setting(
        "auto", "text", MEMORY, "Type of cached keys and values. auto: as --dtype.",
        choices=("auto", "float16", "bfloat16", "float32"),
    )  # fmt: skip
    enable_prefix_caching: bool = setting(True, "switch", MEMORY, "Reuse the KV cache of prompts that begin alike.")
    prefix_caching_hash_algo: str = setting(
        "sha256", "text", MEMORY,
        "Hash that tells equal prefixes; sha256 is quicker where the processor has instructions for it.",
        choices=("sha256", "blake2b"),
    )  # fmt: skip

    max_num_batched_tokens: int | None = setting(
        None, "count", SCHEDULING,
        "Most tokens in one step, prompts and answers together. Default: by device.", low=1, high=INT32_MAX,
        optional=True,
    )  # fmt: skip
    max_num_seqs: int | None = setting(
        None, "count", SCHEDULING, "Most requests that run at the same time. Default: by device.", low=1, high=65536,
        optional=True,
    )  # fmt: skip
    enable_chunked_prefill: bool = setting(
        True, "switch", SCHEDULING,
        "Spread long prompts over several steps, so that running answers are not held up.",
    )  # fmt: skip
    long_prefill_token_threshold: int = setting(
        0, "count", SCHEDULING, "Most tokens that one prompt gives to one step; 0: only the step's own limit.", low=0,
        high=INT32_MAX,
    )  # fmt: skip
    scheduling_policy: str = setting(
        "fcfs", "text", SCHEDULING,
        "Who runs first: fcfs (first come), priority (lower number first), fair (equal tokens per tenant).",
        choices=("fcfs", "priority", "fair"), open_choices=True,
    )  # fmt: skip
    tenant_weights: Mapping[str, Any] = setting(
        {}, "table", SCHEDULING,
        'Share of each tenant under the fair policy, as JSON: {"team-a": 2}. A tenant not named has 1.',
    )  # fmt: skip
    max_num_queued_reqs: int | None = setting(
        None, "count", SCHEDULING, "Most waiting requests; further ones are refused. Default: 4096.", low=1,
        high=INT32_MAX, optional=True,
    )  # fmt: skip
    max_num_queued_tokens: int | None = setting(
        None, "count", SCHEDULING, "Most prompt tokens of waiting requests. Default: 64M.", low=1, high=2**50,
        optional=True,
    )  # fmt: skip
    async_scheduling: bool | None = setting(
        None, "switch", SCHEDULING,
        "Plan the next step while the device computes the present one. Default: on, but off on a CPU.", optional=True,
    )  # fmt: skip

    device: str = setting("auto", "text", COMPUTE, "Where to compute.", choices=("auto", "cpu", "cuda"))
    num_threads: int | None = setting(
        None, "count", COMPUTE, "CPU threads. Default: one per core that this process may use.", low=1, high=4096,
        optional=True,
    )  # fmt: skip
    attention_backend: str | None = setting(
        None, "text", COMPUTE,
        "Attention implementation; octavo attention lists them. auto: the best that supports model and device. "
        "Default: what OCTAVO_ATTENTION_BACKEND says, else auto.",
        choices=("auto",), open_choices=True, optional=True,
    )  # fmt: skip
    enforce_eager: bool = setting(
        False, "switch", COMPUTE, "Capture no graphs: starts sooner, runs slower on a GPU. Changes nothing on a CPU."
    )
    tensor_parallel_size: int = setting(
        1, "count", COMPUTE, "Devices that share each layer. Only 1 by now.", low=1, high=1024, short=("-tp",)
    )
    distributed_executor_backend: str = setting(
        "inline", "text", COMPUTE,
        "What carries steps to devices: inline (the engine's own process), or an import path module:callable.",
        choices=("inline", "uni"), open_choices=True,
    )  # fmt: skip
    disable_log_stats: bool | None = setting(
        None, "switch", COMPUTE,
        "Do not log throughput while working. Default: logged by the server, not by generate, chat and LLM.",
        optional=True,
    )  # fmt: skip
    torch_profiler_dir: str | None = setting(
        None, "text", COMPUTE, "Folder for recordings of torch's profiler, which start_profile and stop_profile make.",
        optional=True,
    )  # fmt: skip

    chat_template: str | None = setting(
        None, "path_or_text", FRONTEND, "A Jinja chat template, or a file with one. Default: the model's own.",
        optional=True,
    )  # fmt: skip
    generation_config: str = setting(
        "auto", "text", FRONTEND,
        "auto: the model's generation_config.json gives the defaults of sampling; vllm: neutral defaults.",
        choices=("auto", "vllm"),
    )  # fmt: skip
    override_generation_config: Mapping[str, Any] = setting(
        {}, "table", FRONTEND, 'Sampling defaults that replace both, as JSON: {"temperature": 0.5}.'
    )
    max_logprobs: int = setting(
        20, "count", FRONTEND, "Most log-probabilities per token that a request may ask for; -1: the vocabulary.",
        low=-1, high=INT32_MAX,
    )  # fmt: skip
    stream_interval: int = setting(
        1, "count", FRONTEND,
        "Tokens of an answer from one output of a stream to the next; the first and the last come at once. More cost "
        "the frontend less, and come less smoothly.",
        low=1, high=INT32_MAX,
    )  # fmt: skip
    logprobs_mode: str = setting(
        "raw_logprobs", "text", FRONTEND,
        "What logprobs means: before (raw) or after (processed) penalties and temperature, normalised or logits.",
        choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    )  # fmt: skip
    logits_processors: tuple[str, ...] = setting(
        (), "names", FRONTEND, "Import paths module:Class of further logits processors."
    )
    seed: int = setting(
        0, "count", FRONTEND, "Seed of requests that bring none, and of dummy weights.", low=0, high=2**63 - 1
    )

    def __post_init__(self) -> None:
        for name, each in settings_of(EngineArgs).items():
            # Frozen for everybody else; this is where text becomes a value.
            object.__setattr__(self, name, each.check(name, getattr(self, name)))
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", _template_text(self.chat_template))
        if self.max_model_len == -1:
            object.__setattr__(self, "max_model_len", "auto")
        if self.max_model_len == 0:
            raise ConfigError("max_model_len is 0, but must be at least 1, or auto", param="max_model_len")
        if self.block_size is not None and self.block_size % 16:
            raise ConfigError(
                f"block_size is {self.block_size}, but must be a multiple of 16 from 16 to 256", param="block_size"
            )
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, but this version runs on one device only: "
                "leave it out or give 1",
                param="tensor_parallel_size",
            )

    def non_default(self) -> dict[str, Any]:
        """Settings that differ from the defaults, for the log."""
        default = EngineArgs()
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }


def _template_text(value: str) -> str:
    """A template given outright, or the content of the file of that name."""
    if "{" in value or "\n" in value:
        return value
    try:
        text = Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template is {value!r}, which is neither a readable file ({error}) nor a Jinja template (those "
            "contain a '{')",
            param="chat_template",
        ) from None
    if "{" not in text:
        raise ConfigError(
            f"chat_template: {value} holds no Jinja template (there is no '{{' in it)", param="chat_template"
        )
    return text

"""Request fields that clients know and that this version does not honour: each is refused with a 400 that names it.

A value that asks for what happens anyway (null, ``"store": false``) passes. So no field is accepted and then ignored;
a test walks every field of OpenAI's request types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import InvalidRequestError

_TOOLS = "tool calls are not supported by this version yet"
_STRUCTURED = "structured outputs are not supported by this version yet"
_MEDIA = "only text is supported"


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a field is refused, and which values of it are none the less fine (None always is)."""

    why: str
    neutral: Callable[[Any], bool] = lambda _value: False


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def _is_text_format(value: Any) -> bool:
    return value == {"type": "text"}


SHARED: Mapping[str, Unsupported] = {
    "structured_outputs": Unsupported(_STRUCTURED),
    "guided_json": Unsupported(_STRUCTURED),
    "guided_regex": Unsupported(_STRUCTURED),
    "guided_choice": Unsupported(_STRUCTURED),
    "guided_grammar": Unsupported(_STRUCTURED),
    "guided_decoding_backend": Unsupported(_STRUCTURED),
    "guided_whitespace_pattern": Unsupported(_STRUCTURED),
    "response_format": Unsupported(_STRUCTURED, _is_text_format),
    "logits_processors": Unsupported("load them with --logits-processors, and give their arguments in vllm_xargs"),
    "prompt_embeds": Unsupported("prompts are text or token ids"),
    "kv_transfer_params": Unsupported("the KV cache stays on this server"),
    "mm_processor_kwargs": Unsupported(_MEDIA, _is({})),
    "media_io_kwargs": Unsupported(_MEDIA, _is({})),
    "return_routed_experts": Unsupported("routing is not reported", _is(False)),
}
CHAT: Mapping[str, Unsupported] = {
    **SHARED,
    "tools": Unsupported(_TOOLS),
    "tool_choice": Unsupported(_TOOLS, _is("none", "auto")),
    "parallel_tool_calls": Unsupported(_TOOLS, _is(True, False)),
    "functions": Unsupported(_TOOLS),
    "function_call": Unsupported(_TOOLS, _is("none", "auto")),
    "audio": Unsupported(_MEDIA),
    "modalities": Unsupported(_MEDIA, _is(["text"])),
    "prediction": Unsupported("predicted outputs are not supported"),
    "web_search_options": Unsupported("there is no web search"),
    "moderation": Unsupported("there is no moderation"),
    "store": Unsupported("nothing is stored", _is(False)),
    "service_tier": Unsupported("there is one tier; use priority", _is("auto", "default")),
    "verbosity": Unsupported("this model has no such switch; say it in a message", _is("medium")),
    "prompt_cache_retention": Unsupported("cached prefixes live in memory", _is("in_memory", "in-memory")),
    "prompt_cache_options": Unsupported("every prefix is cached, and found by its content", _is({})),
}
COMPLETIONS: Mapping[str, Unsupported] = {
    **SHARED,
    "suffix": Unsupported("filling in before a suffix is not supported", _is("")),
}
SHARED_TOKENS: Mapping[str, Unsupported] = {"tools": Unsupported(_TOOLS), "mm_processor_kwargs": Unsupported(_MEDIA)}
"""Of ``/tokenize``."""
POOLING: Mapping[str, Unsupported] = {
    "messages": Unsupported("give input: texts or token ids"),
    "embed_dtype": Unsupported("vectors are float32", _is("float32", "float")),
    "endianness": Unsupported("base64 is little-endian", _is("little", "native")),
    "add_special_tokens": Unsupported("texts get the frame that the model was trained with", _is(True)),
    "softmax": Unsupported("use use_activation"),
    "mm_processor_kwargs": Unsupported(_MEDIA, _is({})),
    "max_tokens_per_doc": Unsupported("use truncate_prompt_tokens"),
    "instruction": Unsupported("write it into the texts"),
}
"""Of the routes of a model that pools."""
STREAM_OPTIONS: Mapping[str, Unsupported] = {
    "include_obfuscation": Unsupported("chunks are not padded", _is(False)),
}


def refuse_unsupported(body: Mapping[str, Any], table: Mapping[str, Unsupported], prefix: str = "") -> None:
    """Look for fields that cannot be honoured.

    Args:
        body: The request, or an object in it.
        table: What is not supported in it.
        prefix: Path of the object.

    Raises:
        InvalidRequestError: ``param`` names the first.
    """
    for name, unsupported in table.items():
        value = body.get(name)
        if value is not None and not unsupported.neutral(value):
            refusal = InvalidRequestError(
                f"{prefix}{name} is not supported: {unsupported.why}; leave it out", param=prefix + name
            )
            refusal.code = "unsupported_parameter"
            raise refusal

"""What all generation requests share: the model's base class, bounded types, and the sampling fields.

Types are strict (no ``"1"`` for 1, no ``true`` for 1), every number is finite and bounded, and None means "not given"
everywhere. Fields that nobody knows are ignored; those that somebody knows and that are not honoured yet are in
``server/unsupported.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from octavo.frontend.beam_search import MAX_LENGTH_PENALTY
from octavo.sampling_params import RepetitionDetection, SamplingParams
from octavo.server.schemas.tables import free_table, numbers_table

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 4096
MAX_IDS = MAX_BIASES = 300_000
"""More than any vocabulary."""
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 1024, 128
"""Each is tokenized twice."""


def _whole(value: object) -> object:
    """JSON knows one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("out_of_bounds", "at least 1, or -1 for as many as fit")
    return value


def _stops(value: object) -> object:
    """One text or several; a union of pydantic would tell of both branches at once."""
    texts: list[object] = cast("list[object]", value) if isinstance(value, list) else [value]
    if value is None or not texts:
        return None
    if len(texts) > MAX_STOPS:
        raise PydanticCustomError("too_long", "at most 64 texts", {"noun": "texts"})
    for text in texts:
        if not isinstance(text, str):
            raise PydanticCustomError("string_type", "a string or a list of strings")
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise PydanticCustomError(
                "string_too_long" if text else "string_too_short", "made of texts of 1 to 4096 characters"
            )
    return cast("object", value)


_STOP_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
STOPS: Any = PlainValidator(
    _stops,
    json_schema_input_type=Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [
                    _STOP_SCHEMA,
                    {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS},
                    {"type": "null"},
                ]
            }
        ),
    ],
)

WHOLE = BeforeValidator(_whole)
"""After the bounds in an annotation, so that they reach the OpenAPI description."""
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX), WHOLE]
Text = Annotated[str, StringConstraints(min_length=1)]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=INT64_MAX), WHOLE]
FreeTable = Annotated[dict[str, Any], free_table()]
Milliseconds = Annotated[int, Field(ge=1, le=INT32_MAX), WHOLE]


class RequestModel(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(RequestModel):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="A last chunk with the token counts of the whole request.")
    continuous_usage_stats: bool | None = Field(None, description="Token counts so far with every chunk.")


class RepetitionFields(RequestModel):
    """End an answer that repeats a pattern of tokens."""

    max_pattern_size: Annotated[int, Field(ge=1, le=4096), WHOLE]
    min_pattern_size: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    min_count: Annotated[int, Field(ge=2, le=4096), WHOLE] | None = None


class GenerationRequest(RequestModel):
    """Fields of chat and text completions alike."""

    model: Annotated[str, StringConstraints(max_length=1 << 16)] | None = Field(
        None, description="One of /v1/models; may be left out, as there is one model."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N), WHOLE] | None = Field(None, description="Answers per prompt.")
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX), WHOLE] | None = Field(None, description="0 and -1: all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX), WHOLE] | None = None
    stop: Annotated[str | list[str] | None, STOPS] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX), WHOLE] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX), WHOLE, AfterValidator(_not_zero)] | None = Field(
        None, description="Keep only this many last tokens of the prompt; -1: as many as fit."
    )
    logit_bias: Annotated[dict[str, float], numbers_table(MAX_BIASES)] | None = Field(
        None, description="Token id to a number from -100 to 100 that is added to its score."
    )
    prompt_logprobs: Annotated[int, Field(ge=-1, le=INT32_MAX), WHOLE] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    repetition_detection: RepetitionFields | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=INT64_MAX), WHOLE] | None = None
    skip_reading_prefix_cache: bool | None = None
    vllm_xargs: FreeTable | None = Field(None, description="Arguments of logits processors of your own.")
    priority: Annotated[int, Field(ge=-INT64_MAX, le=INT64_MAX), WHOLE] | None = Field(
        None, description="Lower runs first; needs --scheduling-policy priority."
    )
    request_id: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[!-~]+$")] | None = None
    cache_salt: Label | None = Field(None, description="Prompts share cached prefixes only under one salt.")
    timeout_ms: Milliseconds | None = Field(None, description="End the request with an error after this time.")
    max_queue_ms: Milliseconds | None = Field(None, description="End it with an error if no token came by then.")
    use_beam_search: bool | None = Field(None, description="Return the n likeliest answers that are found together.")
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] | None = Field(
        None, description="Of beam search: above 0 prefers long answers. Default: 1."
    )
    return_tokens_as_token_ids: bool | None = Field(None, description="Tokens in logprobs read token_id:N.")
    return_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    include_metrics: bool | None = Field(None, description="false: no timings in the answer.")
    user: str | None = Field(None, description="Shown in the request log; nothing else depends on it.")


_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "bad_words",
    "thinking_token_budget", "skip_reading_prefix_cache",
)  # fmt: skip
"""Fields that SamplingParams has under the same name."""


def sampling_values(request: GenerationRequest) -> dict[str, Any]:
    """Keywords for ``SamplingParams`` of the fields that were given, but for lengths and logprobs.

    Raises:
        InvalidRequestError: ``repetition_detection`` contradicts itself.
    """
    values: dict[str, Any] = {
        name: value for name in _SAME if (value := getattr(request, name)) is not None and value != []
    }
    if request.vllm_xargs is not None:
        values["extra_args"] = request.vllm_xargs
    if request.repetition_detection is not None:
        values["repetition_detection"] = RepetitionDetection(
            **request.repetition_detection.model_dump(exclude_none=True)
        )
    return values


def with_defaults(values: dict[str, Any], defaults: SamplingParams) -> dict[str, Any]:
    """``values`` over the model's own defaults."""
    neutral = SamplingParams()
    given = {
        name: value
        for name in SamplingParams.__struct_fields__
        if (value := getattr(defaults, name)) != getattr(neutral, name)
    }
    return {**given, **values}

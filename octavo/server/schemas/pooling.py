"""Bodies of the routes of a model that pools: embeddings, scores, reranking, classes. See ``common.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from octavo.server.schemas.common import INT32_MAX, WHOLE, Label, Milliseconds, RequestModel

MAX_TEXTS = 2048
MAX_IDS = 1 << 20
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_TEXTS}


def _inputs(value: object) -> list[Any]:
    """A text, texts, token ids, or several lists of those; as a list of prompts. Ids are checked with the model."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("input_type", "a string, token ids, or a list of these that is not empty")
    items = cast("list[Any]", value)
    if isinstance(items[0], int):
        items = [items]
    if len(items) > MAX_TEXTS:
        raise PydanticCustomError("too_long", "at most 2048 texts", {"noun": "texts"})
    kind = str if isinstance(items[0], str) else list
    if not all(isinstance(item, kind) for item in items):
        raise PydanticCustomError("input_type", "texts only, or lists of token ids only")
    if kind is list and sum(len(item) for item in items) > MAX_IDS:
        raise PydanticCustomError("too_long", "at most 2^20 token ids", {"noun": "token ids"})
    return items


def _texts(value: object) -> list[str]:
    """A text or texts; an object with ``text`` is one too."""
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not 0 < len(items) <= MAX_TEXTS:
        raise PydanticCustomError("too_long", "from 1 to 2048 texts", {"noun": "texts"})
    texts = [cast("dict[str, Any]", item).get("text") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("string_type", "a string, an object with text, or a list of these")
    return cast("list[str]", texts)


_ONE_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}]}
Inputs = Annotated[
    list[Any],
    PlainValidator(
        _inputs,
        json_schema_input_type=Annotated[
            Any,
            WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
        ],
    ),
]
Texts = Annotated[
    list[str],
    PlainValidator(
        _texts,
        json_schema_input_type=Annotated[
            Any, WithJsonSchema({"anyOf": [*_ONE_TEXT["anyOf"], {"type": "array", "items": _ONE_TEXT}]})
        ],
    ),
]


class PoolingRequestModel(RequestModel):
    """Fields of all of them."""

    model: Annotated[str, StringConstraints(max_length=10_000)] | None = Field(
        None, description="One of /v1/models; may be left out, as there is one model."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="Cut longer texts at their end to so many tokens; -1: to what the model takes."
    )
    priority: Annotated[int, Field(ge=-(2**31), le=INT32_MAX), WHOLE] | None = None
    cache_salt: Label | None = None
    request_id: Annotated[str, StringConstraints(pattern=r"^[ -~]{1,128}$")] | None = None
    timeout_ms: Milliseconds | None = None
    user: str | None = Field(None, description="Shown nowhere.")


class EmbeddingRequest(PoolingRequestModel):
    """``POST /v1/embeddings``."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: float32 values, little-endian. Default: float."
    )
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="Keep so many leading dimensions, then normalise; for models trained so."
    )
    use_activation: bool | None = Field(None, description="Whether vectors are normalised. Default: as the model says.")
    normalize: bool | None = Field(None, description="The same.")


class PoolingRequest(EmbeddingRequest):
    """``POST /pooling``."""

    task: Literal["embed", "classify", "token_embed", "encode"] | None = None


class ClassificationRequest(PoolingRequestModel):
    """``POST /classify``."""

    input: Inputs
    use_activation: bool | None = Field(None, description="Probabilities instead of plain scores. Default: true.")


class ScoreRequest(PoolingRequestModel):
    """``POST /score``; each side has three names."""

    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    data_2: Texts | None = None
    use_activation: bool | None = None


class RerankRequest(PoolingRequestModel):
    """``POST /rerank``."""

    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=0, le=INT32_MAX), WHOLE] | None = Field(
        None, description="How many of the best to show; 0 or absent: all."
    )
    return_documents: bool | None = Field(None, description="Show the texts again. Default: true.")
    use_activation: bool | None = None

"""What a refusal says: status, code and field, as clients of OpenAI switch on them; and that it says no more, and takes
no longer, for a body of megabytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from octavo.server.openai_errors import from_validation
from octavo.server.schemas.chat import ChatRequest
from octavo.server.schemas.completions import MAX_IDS, CompletionRequest
from octavo.server.schemas.pooling import EmbeddingRequest, RerankRequest
from octavo.server.schemas.tokens import AbortRequest, DetokenizeRequest, TokenizeRequest
from tests.server.conftest import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
MANY = 100_000
DEEP: dict[str, Any] = {"a": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}
IMAGE = {"type": "image_url", "image_url": {"url": "http://a.example/b"}}


class Untouchable(str):
    """Not to be shown."""

    def __repr__(self) -> str:
        raise AssertionError("looked at")


def told(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (CHAT, {"messages": None}, "invalid_type", "messages"),
        (CHAT, {"messages": []}, "empty_array", "messages"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
        (CHAT, {"messages": [*HI, {"role": "user", "content": [IMAGE]}]}, "invalid_value", "messages[1].content[0]"),
        (CHAT, {"messages": [*HI, {"role": "tool", "content": "x"}]}, "invalid_value", "messages[1].tool_call_id"),
        (CHAT, {"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        (CHAT, {"temperature": "hot"}, "invalid_type", "temperature"),
        (CHAT, {"n": 129}, "integer_above_max_value", "n"),
        (CHAT, {"n": 0}, "integer_below_min_value", "n"),
        (CHAT, {"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        (CHAT, {"stop": ["x"] * 65}, "array_above_max_length", "stop"),
        (CHAT, {"cache_salt": "x" * 257}, "string_above_max_length", "cache_salt"),
        (CHAT, {"logit_bias": {"1": "x"}}, "invalid_type", "logit_bias"),
        (CHAT, {"metadata": {"a": 1}}, "invalid_type", "metadata"),
        (CHAT, {"metadata": {str(key): "" for key in range(17)}}, "array_above_max_length", "metadata"),
        (CHAT, {"documents": [{"text": 1}]}, "invalid_type", "documents[0]"),
        (CHAT, {"chat_template_kwargs": DEEP}, "invalid_value", "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"a": "x" * 1_000_000}}, "invalid_value", "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"a": [0] * MANY}}, "invalid_value", "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
        (CHAT, {"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
        (CHAT, {"bad_words": ["x" * 129]}, "string_above_max_length", "bad_words[0]"),
        (CHAT, {"logits_processors": ["a.b"]}, "unsupported_parameter", "logits_processors"),
        (CHAT, {"tools": []}, "unsupported_parameter", "tools"),
        (TEXT, {"prompt": []}, "empty_array", "prompt"),
        *((TEXT, {"prompt": [value]}, "invalid_value", "prompt") for value in (-1, 2**31, 1.5, True)),
        (TEXT, {"prompt": "word " * 4000}, "context_length_exceeded", "prompt"),
        (TEXT, {"prompt": ["x"] * 1025}, "array_above_max_length", "prompt"),
        (TEXT, {"vllm_xargs": DEEP}, "invalid_value", "vllm_xargs"),
        ("/tokenize", {"prompt": "word " * (1 << 20)}, "string_above_max_length", "prompt"),
        ("/tokenize", {"prompt": None, "messages": [{"role": "user", "content": "word " * (1 << 20)}]},
         "string_above_max_length", "messages"),
        ("/tokenize", {"prompt": None, "messages": [1]}, "invalid_type", "messages[0]"),
    ],
)  # fmt: skip
def test_codes_and_fields(client: httpx.Client, path: str, fields: dict[str, Any], code: str, param: str) -> None:
    body = {"messages": HI, **fields} if path == CHAT else {"prompt": "Hi", **fields}
    assert told(client.post(path, json=body)) == (400, code, param)


def test_an_unknown_model_of_any_length(client: httpx.Client) -> None:
    body = {"messages": HI, "model": "gpt\n\x1b[31m" * 2000}
    assert told(client.post(CHAT, json=body)) == (404, "model_not_found", "model")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none(client: httpx.Client, number: str) -> None:
    for field in ("temperature", "logit_bias"):
        value = number if field == "temperature" else f'{{"1": {number}}}'
        response = client.post(TEXT, content=f'{{"prompt": "Hi", "{field}": {value}}}')
        assert told(response)[:2] == (400, "invalid_type")
        assert told(response)[2] in (field, None) and (field != "temperature" or told(response)[2] == field)
    response = client.post(TEXT, content=f'{{"prompt": "Hi", "vllm_xargs": {{"a": [{number}]}}}}')
    assert told(response)[:2] == (400, "invalid_type")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"stop": list("abcde")}, "array_above_max_length", "stop"),
        ({"temperature": 2, "stop": list("abcd")}, None, None),
    ],
)
def test_strictness_of_openai_on_demand(
    start_server: Callable[..., Server], client: httpx.Client, fields: dict[str, Any], code: str | None, param: str
) -> None:
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1, **fields}
    assert client.post(TEXT, json=body).status_code == 200
    with start_server(strict_openai=True).client() as strict:
        answer = strict.post(TEXT, json=body)
    assert answer.status_code == 200 if code is None else told(answer) == (400, code, param)


WRONG: list[tuple[type[BaseModel], dict[str, Any]]] = [
    *(
        (ChatRequest, {"messages": HI, **fields})
        for fields in (
            {"messages": [1] * MANY},
            {"stop_token_ids": ["x"] * MANY},
            {"allowed_token_ids": ["x"] * MANY},
            {"logprob_token_ids": ["x"] * MANY},
            {"bad_words": [""] * MANY},
            {"stop": [1] * MANY},
            {"logit_bias": {str(key): "x" for key in range(MANY)}},
            {"metadata": {str(key): 1 for key in range(MANY)}},
            {"documents": [1] * MANY},
            {"documents": [{str(key): 1 for key in range(MANY)}]},
            {"seed": [[1] * MANY] * 3},
            {"user": {str(key): 1 for key in range(MANY)}},
        )
    ),
    (CompletionRequest, {"prompt": [1.5] * MANY}),
    (CompletionRequest, {"prompt": [[]] * MANY}),
    (EmbeddingRequest, {"input": [{}] * MANY}),
    (RerankRequest, {"query": "a", "documents": [1] * MANY}),
    (TokenizeRequest, {"messages": [1] * MANY}),
    (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    (AbortRequest, {"request_ids": [1] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_of_many_wrong_items_the_first_is_told_and_no_other_looked_at(
    model: type[BaseModel], body: dict[str, Any]
) -> None:
    # Noting all of them cost seconds, in which the event loop stood still for everybody.
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() == 1
    refusal = from_validation(caught.value)
    assert (refusal.param or "").partition("[")[0] in body and len(refusal.message) < 300


def test_a_prompt_of_more_ids_than_any_context_is_not_gone_through() -> None:
    half = [Untouchable("x")] * (MAX_IDS // 2 + 1)
    for prompt in (half * 2, [[1] * (MAX_IDS // 2), half]):
        with pytest.raises(ValidationError) as caught:
            CompletionRequest.model_validate({"prompt": prompt})
        refusal = from_validation(caught.value)
        assert (refusal.param, refusal.code) == ("prompt", "array_above_max_length")


def test_a_value_is_shown_by_its_beginning() -> None:
    class Model(BaseModel):
        field: int

    rest = [Untouchable("x")] * MANY
    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"field": [1] * 50 + rest})
    assert from_validation(caught.value).message.startswith("field is [1, 1, 1")

"""Every field of OpenAI's request types is honoured, or refused with a 400 that names it. Nothing is ignored."""

from __future__ import annotations

import typing
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_params

from octavo.server.schemas.chat import ChatRequest
from octavo.server.schemas.common import StreamOptions
from octavo.server.schemas.completions import CompletionRequest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
REFUSED_CHAT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {},
    "parallel_tool_calls": "maybe",
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"anything": 1},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",  # the template of this model has no switch for it
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [TOOL],
    "verbosity": "high",
    "web_search_options": {},
}
HONOURED_CHAT: dict[str, Any] = {
    "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
    "model": "alias",
    "frequency_penalty": 0.5,
    "logit_bias": {"5": -3},
    "logprobs": True,
    "max_completion_tokens": 2,
    "max_tokens": 2,
    "metadata": {"team": "a"},
    "n": 1,
    "presence_penalty": 0.5,
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "seed": 1,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_logprobs": 1,
    "top_p": 0.5,
    "user": "u",
}
NEUTRAL_CHAT: dict[str, Any] = {
    "function_call": "none", "modalities": ["text"], "parallel_tool_calls": True, "prompt_cache_retention": "in_memory",
    "reasoning_effort": "none", "response_format": {"type": "text"}, "service_tier": "auto", "store": False,
    "tool_choice": "none", "verbosity": "medium",
}  # fmt: skip
"""Values of refused fields that ask for what happens anyway."""
REFUSED_TEXT: dict[str, Any] = {"suffix": "end"}
HONOURED_TEXT: dict[str, Any] = {
    "model": "alias", "prompt": "Hi", "best_of": 1, "echo": True, "frequency_penalty": 0.5, "logit_bias": {"5": -3},
    "logprobs": 1, "max_tokens": 2, "n": 1, "presence_penalty": 0.5, "seed": 1, "stop": "x", "stream": True,
    "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.5, "user": "u",
}  # fmt: skip
NEEDED = {"top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}}


def fields_of(module: Any) -> set[str]:
    """All fields of a request, streaming or not."""
    return set(typing.get_type_hints(module.CompletionCreateParamsBase)) | {"stream"}


def test_the_tables_name_every_field() -> None:
    """Red when a new release of the openai package has a field that nobody has decided about."""
    assert fields_of(chat_params) == {*REFUSED_CHAT, *HONOURED_CHAT}
    assert fields_of(text_params) == {*REFUSED_TEXT, *HONOURED_TEXT}
    assert set(ChatRequest.model_fields) >= set(HONOURED_CHAT)
    assert set(CompletionRequest.model_fields) >= set(HONOURED_TEXT)
    assert {*StreamOptions.model_fields, "include_obfuscation"} >= set(
        typing.get_type_hints(ChatCompletionStreamOptionsParam)
    )


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}


@pytest.mark.parametrize("name", sorted(REFUSED_CHAT))
def test_chat_refuses_by_name(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/chat/completions", json=chat_body(**{name: REFUSED_CHAT[name]}))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, name)
    assert name in error["message"]


@pytest.mark.parametrize("name", sorted(HONOURED_CHAT))
def test_chat_honours(client: httpx.Client, name: str) -> None:
    fields = {**NEEDED.get(name, {}), name: HONOURED_CHAT[name]}
    assert client.post("/v1/chat/completions", json=chat_body(**fields)).status_code == 200


@pytest.mark.parametrize("name", sorted(NEUTRAL_CHAT))
def test_a_value_that_asks_for_nothing_passes(client: httpx.Client, name: str) -> None:
    assert client.post("/v1/chat/completions", json=chat_body(**{name: NEUTRAL_CHAT[name]})).status_code == 200
    assert client.post("/v1/chat/completions", json=chat_body(**{name: None})).status_code == 200


def test_a_padded_stream_is_refused(client: httpx.Client) -> None:
    fields = {"stream": True, "stream_options": {"include_obfuscation": True}}
    response = client.post("/v1/chat/completions", json=chat_body(**fields))
    assert response.json()["error"]["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize("name", sorted(HONOURED_TEXT))
def test_completions_honour(client: httpx.Client, name: str) -> None:
    fields = {**NEEDED.get(name, {}), name: HONOURED_TEXT[name]}
    assert client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1, **fields}).status_code == 200


@pytest.mark.parametrize("name", sorted(REFUSED_TEXT))
def test_completions_refuse_by_name(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "Hi", name: REFUSED_TEXT[name]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)

"""``/v1/chat/completions``: what comes back, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import CONTEXT, Server

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **fields}


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The chunks, after a look at their form."""
    with client.stream("POST", CHAT, json=body(stream=True, **fields)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.read().decode().split("\n\n") if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return chunks


def test_an_answer_has_all_that_clients_read(client: httpx.Client) -> None:
    answer = ask(client)
    ChatCompletion.model_validate(answer)
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert answer["metrics"]["time_to_first_token_ms"] > 0


def test_cached_tokens_are_told(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "word " * 60}]
    ask(client, messages=long)
    usage = ask(client, messages=long)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    salted = ask(client, messages=long, cache_salt="another's")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_stream_joins_to_the_whole_answer(client: httpx.Client) -> None:
    whole = ask(client)
    chunks = stream(client, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert [each["choices"][0]["finish_reason"] for each in chunks if each["choices"]][-1] == "length"
    assert len({each["id"] for each in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(each["usage"] is None for each in chunks[:-1])


def test_a_stream_without_usage_has_none(client: httpx.Client) -> None:
    assert all("usage" not in chunk for chunk in stream(client))


def test_usage_with_every_chunk(client: httpx.Client) -> None:
    chunks = stream(client, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_several_answers(client: httpx.Client) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 7}
    whole = ask(client, **fields)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in stream(client, **fields):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_beam_search(client: httpx.Client) -> None:
    answer = ask(client, use_beam_search=True, n=2, max_tokens=4, logprobs=True, top_logprobs=1, length_penalty=0.5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["message"]["role"] == "assistant" for choice in answer["choices"])
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    shown = ["".join(each["token"] for each in choice["logprobs"]["content"]) for choice in answer["choices"]]
    assert len(set(texts)) == 2 and shown == texts


def test_every_event_has_one_choice(client: httpx.Client) -> None:
    """As OpenAI and vLLM send it: many a client looks at ``choices[0]`` alone."""
    chunks = stream(client, n=3, temperature=1.0, return_token_ids=True)
    assert {len(chunk["choices"]) for chunk in chunks} == {1}
    first = [chunk for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert [chunk["choices"][0]["index"] for chunk in first] == [0, 1, 2]
    assert sum("prompt_token_ids" in chunk for chunk in chunks) == 1


def test_logprobs(client: httpx.Client) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    positions = answer["choices"][0]["logprobs"]["content"]
    assert len(positions) == 8
    for position in positions:
        tops = position["top_logprobs"]
        assert len(tops) == 3
        assert tops[0]["logprob"] >= tops[1]["logprob"] >= tops[2]["logprob"]
        assert position["logprob"] == tops[0]["logprob"]  # greedy
        assert bytes(position["bytes"]).decode() == position["token"]
    assert "".join(each["token"] for each in positions) == answer["choices"][0]["message"]["content"]
    streamed = [each for chunk in stream(client, logprobs=True, top_logprobs=3) for each in chunk["choices"]]
    entries = [entry for choice in streamed if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert entries == positions
    ids = ask(client, logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    assert [each["token"] for each in ids["logprobs"]["content"]] == [f"token_id:{each}" for each in ids["token_ids"]]


def test_sampling_fields_reach_the_engine(client: httpx.Client) -> None:
    plain = ask(client, return_token_ids=True)["choices"][0]
    first = plain["token_ids"][0]
    banned = ask(client, logit_bias={str(first): -100}, return_token_ids=True)["choices"][0]
    assert first not in banned["token_ids"]
    allowed = ask(client, allowed_token_ids=[500, 501], return_token_ids=True)["choices"][0]
    assert set(allowed["token_ids"]) <= {500, 501}
    stopped = ask(client, stop_token_ids=[plain["token_ids"][2]], return_token_ids=True)["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == plain["token_ids"][2]
    word = plain["message"]["content"].split()[0]
    cut = ask(client, stop=[word])["choices"][0]
    assert cut["stop_reason"] == word
    assert word not in (cut["message"]["content"] or "")
    kept = ask(client, stop=word, include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"].endswith(word)
    same = [ask(client, temperature=1.5, seed=3)["choices"][0]["message"]["content"] for _ in range(2)]
    assert same[0] == same[1]
    assert ask(client, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    forced = ask(client, allowed_token_ids=[2], min_tokens=0)["choices"][0]
    assert forced["finish_reason"] == "stop"
    assert ask(client, allowed_token_ids=[2], ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_the_last_message_can_be_gone_on_with(client: httpx.Client) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The sea is"}]
    opened = ask(client, messages=messages, continue_final_message=True, return_prompt_text=True, echo=True)
    assert opened["prompt_text"].endswith("The sea is")
    assert opened["choices"][0]["message"]["content"].startswith("The sea is")


def test_prompts_can_be_cut_and_shown(client: httpx.Client) -> None:
    whole = ask(client, return_token_ids=True, prompt_logprobs=1)
    ids = whole["prompt_token_ids"]
    assert len(whole["prompt_logprobs"]) == len(ids)
    assert whole["prompt_logprobs"][0] is None
    assert str(ids[1]) in whole["prompt_logprobs"][1]
    cut = ask(client, truncate_prompt_tokens=5, return_token_ids=True)
    assert cut["prompt_token_ids"] == ids[-5:]
    long = [{"role": "user", "content": "word " * CONTEXT}]
    assert ask(client, messages=long, truncate_prompt_tokens=-1, max_tokens=1)["usage"]["prompt_tokens"] == CONTEXT - 1


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"messages": None}, 400, "messages", "invalid_type"),
        ({"messages": []}, 400, "messages", "empty_array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"temperature": -0.1}, 400, "temperature", "decimal_below_min_value"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_type"),
        ({"temperature": True}, 400, "temperature", "invalid_type"),
        ({"top_p": 0}, 400, "top_p", "decimal_below_min_value"),
        ({"top_k": -2}, 400, "top_k", "integer_below_min_value"),
        ({"n": 129}, 400, "n", "integer_above_max_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 2**63}, 400, "max_tokens", "integer_above_max_value"),
        ({"stop": [""]}, 400, "stop", "empty_string"),
        ({"stop": ["a"] * 65}, 400, "stop", "array_above_max_length"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_value"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        ({"stream": True, "prompt_logprobs": 1}, 400, "prompt_logprobs", "invalid_value"),
        ({"stream": "yes"}, 400, "stream", "invalid_type"),
        ({"priority": 3}, 400, "priority", "invalid_value"),
        ({"cache_salt": ""}, 400, "cache_salt", "empty_string"),
        ({"min_tokens": 9}, 400, "min_tokens", "invalid_value"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "invalid_value"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "invalid_value"),
        ({"chat_template_kwargs": {"tools": 1}}, 400, "chat_template_kwargs", "invalid_value"),
        ({"continue_final_message": True, "add_generation_prompt": True}, 400, "continue_final_message",
         "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, 400, "messages", "context_length_exceeded"),
        ({"structured_outputs": {"json": {}}}, 400, "structured_outputs", "unsupported_parameter"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_field_is_named(
    client: httpx.Client, fields: dict[str, Any], status: int, param: str, code: str, streaming: bool
) -> None:
    if streaming and "stream_options" not in fields:
        fields = {"stream": True, **fields}
    response = client.post(CHAT, json=body(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_a_template_of_the_request_runs_bounded(start_server: Callable[..., Server]) -> None:
    """Red when a request's template could hold the server: others are answered meanwhile, and it gets a 400."""
    trusting = start_server(trust_request_chat_template=True)
    with trusting.client() as client:
        good = client.post(CHAT, json=body(chat_template="{{ messages[0].content }}", return_prompt_text=True))
        assert good.json()["prompt_text"] == MESSAGES[0]["content"]
        bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        refused = client.post(CHAT, json=body(chat_template=bomb))
        assert refused.status_code == 400
        assert "does not come to an end" in refused.json()["error"]["message"]


def test_errors_in_vllms_form(start_server: Callable[..., Server]) -> None:
    with start_server(error_format="vllm").client() as client:
        error = client.post(CHAT, json=body(n=0)).json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, "n")

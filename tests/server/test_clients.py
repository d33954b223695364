"""Clients as people have them, against a real server: the openai package, LangChain, curl."""

from __future__ import annotations

import asyncio
import json
import subprocess

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

ASKED = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
MODEL = "smollm2-135m"


@pytest.fixture
def client(real_server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server}/v1", api_key="EMPTY", max_retries=0)


def test_openai_sync(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0, max_completion_tokens=12)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    extras = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, max_tokens=12, extra_body={"min_p": 0.1, "return_token_ids": True}
    )
    assert extras.choices[0].message.content == answer.choices[0].message.content
    assert extras.choices[0].token_ids  # pyright: ignore[reportAttributeAccessIssue] - of vLLM, not of OpenAI
    text = client.completions.create(model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=3)
    assert "6" in text.choices[0].text


def test_openai_streaming(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    pieces, usage = [], None
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == whole
    assert usage is not None
    assert len(pieces) > 2
    with client.chat.completions.stream(**fields) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.content == whole
    texts = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3, stream=True)
    assert {choice.index for chunk in texts for choice in chunk.choices} == {0, 1}


def test_openai_async(real_server: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{real_server}/v1", api_key="EMPTY") as client:
            fields = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 12}
            whole = client.chat.completions.create(**fields)
            stream = await client.chat.completions.create(**fields, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [(await whole).choices[0].message.content or "", "".join(pieces)]

    whole, joined = asyncio.run(run())
    assert whole == joined
    assert "Paris" in whole


def test_openai_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=ASKED, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 2000)
    assert long.value.code == "context_length_exceeded"


def test_langchain(real_server: str) -> None:
    fields = {"base_url": f"{real_server}/v1", "api_key": "EMPTY", "model": MODEL, "temperature": 0, "max_tokens": 12}
    chat = ChatOpenAI(**fields, stream_usage=True)
    answer = chat.invoke([("system", "Be brief."), ("human", ASKED[0]["content"])])
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream(ASKED[0]["content"]))
    assert len(pieces) > 2
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 0
    assert "6" in OpenAI(**{**fields, "max_tokens": 3}).invoke("1, 2, 3, 4, 5,")


def test_curl(real_server: str) -> None:
    body = json.dumps({"messages": ASKED, "max_tokens": 4, "stream": True})
    command = ["curl", "-sSN", f"{real_server}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(line.startswith("data: ") for line in lines if line)
    assert lines[-2:] == ["data: [DONE]", ""]

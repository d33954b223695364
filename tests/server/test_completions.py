"""``/v1/completions``: prompts of all forms, echo, logprobs, best_of, streams."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai.types import Completion

from octavo.server import answers
from tests.server.conftest import CONTEXT, Server

ROUTE = "/v1/completions"
PROMPT = "The sea is"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields}


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(ROUTE, json=body(**fields))
    assert response.status_code == 200, response.text
    answer = response.json()
    if not ("echo" in fields and "logprobs" in fields):  # null for the first token, which OpenAI's types do not know
        Completion.model_validate(answer)
    return answer


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    with client.stream("POST", ROUTE, json=body(stream=True, **fields)) as response:
        assert response.status_code == 200, response.read()
        events = [line for line in response.read().decode().split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def joined(chunks: list[dict[str, Any]], num_choices: int = 1) -> list[str]:
    texts = [""] * num_choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_prompts_of_all_forms(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    single = ask(client)["choices"][0]["text"]
    assert single
    assert ask(client, prompt=ids)["choices"][0]["text"] == single
    for prompts in ([PROMPT, "Paris"], [ids, [5, 6, 7]]):
        choices = ask(client, prompt=prompts)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert choices[0]["text"] == single
    usage = ask(client, prompt=[ids, ids])["usage"]
    assert usage["prompt_tokens"] == 2 * len(ids)
    assert usage["completion_tokens"] == 12


def test_several_prompts_with_several_answers_stream_as_they_are(client: httpx.Client) -> None:
    fields = {"prompt": [PROMPT, "Paris"], "n": 2, "temperature": 1.0, "seed": 5}
    whole = [choice["text"] for choice in ask(client, **fields)["choices"]]
    assert len(set(whole)) == 4
    chunks = stream(client, stream_options={"include_usage": True}, **fields)
    assert joined(chunks, 4) == whole
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_echo(client: httpx.Client) -> None:
    plain = ask(client)["choices"][0]["text"]
    assert ask(client, echo=True)["choices"][0]["text"] == PROMPT + plain
    assert joined(stream(client, echo=True)) == [PROMPT + plain]
    only = ask(client, echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == PROMPT
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0
    assert joined(stream(client, echo=True, max_tokens=0)) == [PROMPT]


def test_logprobs_with_and_without_the_prompt(client: httpx.Client) -> None:
    plain = ask(client, logprobs=2)["choices"][0]
    columns = plain["logprobs"]
    assert "".join(columns["tokens"]) == plain["text"]
    assert columns["text_offset"][0] == 0
    assert columns["text_offset"][1] == len(columns["tokens"][0])
    assert all(len(top) == 2 for top in columns["top_logprobs"])
    echoed = ask(client, logprobs=2, echo=True)["choices"][0]
    both = echoed["logprobs"]
    assert "".join(both["tokens"]) == echoed["text"]
    assert both["token_logprobs"][0] is None
    assert both["top_logprobs"][0] is None
    assert both["tokens"][-6:] == columns["tokens"]
    assert both["token_logprobs"][-6:] == pytest.approx(columns["token_logprobs"], abs=1e-4)
    pieces = [choice["logprobs"] for chunk in stream(client, logprobs=2, echo=True) for choice in chunk["choices"]]
    assert [token for piece in pieces for token in piece["tokens"]] == both["tokens"]
    assert [offset for piece in pieces for offset in piece["text_offset"]] == both["text_offset"]


def test_every_streamed_answer_has_the_logprobs_of_the_echoed_prompt(client: httpx.Client) -> None:
    # More answers than run at a time: the last begin when the first are over.
    fields = {"n": 10, "temperature": 1.0, "seed": 5, "logprobs": 1, "echo": True, "prompt": [PROMPT, "Paris"]}
    whole = [choice["logprobs"] for choice in ask(client, **fields)["choices"]]
    columns = [{"tokens": [], "text_offset": []} for _ in whole]
    for chunk in stream(client, **fields):
        for choice in chunk["choices"]:
            for name, column in columns[choice["index"]].items():
                column += choice["logprobs"][name]
    assert columns == [{name: each[name] for name in ("tokens", "text_offset")} for each in whole]


def test_every_event_has_one_choice(client: httpx.Client) -> None:
    """As OpenAI and vLLM send it: many a client looks at ``choices[0]`` alone."""
    for fields in ({"n": 3, "temperature": 1.0}, {"prompt": [PROMPT, "Paris"]}, {"prompt": ["a", "b"], "echo": True}):
        chunks = stream(client, stream_options={"include_usage": True}, **fields)
        assert [len(chunk["choices"]) for chunk in chunks] == [1] * (len(chunks) - 1) + [0]


def test_beam_search(client: httpx.Client) -> None:
    fields = {"use_beam_search": True, "n": 3, "max_tokens": 5, "ignore_eos": True, "logprobs": 2}
    answer = ask(client, prompt=[PROMPT, "Paris"], return_token_ids=True, include_metrics=True, **fields)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in choices]
    assert sums[:3] == sorted(sums[:3], reverse=True) and sums[3:] == sorted(sums[3:], reverse=True)
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert all("".join(choice["logprobs"]["tokens"]) == choice["text"] for choice in choices)
    assert all(len(top) in (2, 3) for choice in choices for top in choice["logprobs"]["top_logprobs"])
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["metrics"]["generation_time_ms"] > 0
    # The likeliest of five tokens is at least as likely as the greedy ones; and one beam is greedy.
    greedy = ask(client, max_tokens=5, ignore_eos=True, logprobs=0, return_token_ids=True)["choices"][0]
    assert sums[0] >= sum(greedy["logprobs"]["token_logprobs"]) - 1e-4
    one = ask(client, **{**fields, "n": 1}, return_token_ids=True)["choices"][0]
    assert one["token_ids"] == greedy["token_ids"]
    echoed = ask(client, **{**fields, "logprobs": None}, echo=True)["choices"][0]
    assert echoed["text"] == PROMPT + choices[0]["text"] and echoed["logprobs"] is None


def test_a_search_can_be_aborted_and_leaves_nothing(server: Server, client: httpx.Client) -> None:
    fields = {"use_beam_search": True, "n": 4, "max_tokens": 200, "ignore_eos": True, "request_id": "beams"}
    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(client.post, ROUTE, json=body(**fields))
        while not searching.done():  # between two steps of it there is nothing to end: again
            client.post("/v1/requests/beams/abort")
    choices = searching.result().json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"abort"}
    assert server.service.open_requests.engine_ids("cmpl-beams") == []


def test_long_tables_are_made_beside_the_event_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation asks for the logprobs of all tokens of many prompts: others must not wait for their JSON."""
    makers = set[int]()
    make = answers.json_answer

    def noted(content: dict[str, Any]) -> Any:
        makers.add(threading.get_ident())
        return make(content)

    monkeypatch.setattr(answers, "json_answer", noted)
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True}
    few = ask(client, prompt=[[7] * 100], **fields)["choices"]
    (loop,) = makers
    many = ask(client, prompt=[[7] * 100] * 6, **fields)["choices"]
    assert len(makers - {loop}) == 1
    assert len(many) == 6 and {each["text"] for each in many} == {few[0]["text"]}


def test_prompt_logprobs(client: httpx.Client) -> None:
    choice = ask(client, prompt_logprobs=0, return_token_ids=True)["choices"][0]
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    assert choice["prompt_logprobs"][0] is None


def test_best_of_returns_the_likeliest(client: httpx.Client) -> None:
    fields = {"temperature": 1.5, "seed": 11, "logprobs": 0}
    choices = ask(client, n=4, **fields)["choices"]
    means = {each["text"]: sum(each["logprobs"]["token_logprobs"]) / 6 for each in choices}
    ranked = sorted(means, key=lambda text: -means[text])
    best = ask(client, n=2, best_of=4, **fields)
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert best["usage"]["completion_tokens"] == 24
    assert ask(client, best_of=1)["choices"][0]["text"] == ask(client)["choices"][0]["text"]


def test_special_tokens_and_cuts(client: httpx.Client) -> None:
    ids = ask(client, return_token_ids=True)["choices"][0]["prompt_token_ids"]
    assert ask(client, truncate_prompt_tokens=2, return_token_ids=True)["choices"][0]["prompt_token_ids"] == ids[-2:]
    assert (
        ask(client, prompt=ids, truncate_prompt_tokens=2, return_token_ids=True)["choices"][0]["prompt_token_ids"]
        == ids[-2:]
    )
    exact = ask(client, prompt=[7] * (CONTEXT - 1), max_tokens=5)
    assert exact["usage"]["completion_tokens"] == 1  # all that fits


def test_the_default_length_is_sixteen(client: httpx.Client) -> None:
    response = client.post(ROUTE, json={"prompt": PROMPT, "ignore_eos": True})
    assert response.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [[]]}, "prompt", "empty_array"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [49152]}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 1025}, "prompt", "array_above_max_length"),
        ({"prompt": [7] * CONTEXT}, "prompt", "context_length_exceeded"),
        ({"prompt": [PROMPT, "word " * 1000]}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
        ({"best_of": 2, "stream": True, "temperature": 1}, "best_of", "invalid_value"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
        ({"stop_token_ids": [50000]}, "stop_token_ids", "invalid_value"),
        ({"bad_words": [""]}, "bad_words[0]", "empty_string"),
        ({"repetition_detection": {}}, "repetition_detection.max_pattern_size", "missing_required_parameter"),
        ({"timeout_ms": 0}, "timeout_ms", "integer_below_min_value"),
        ({"length_penalty": 2.0}, "length_penalty", "invalid_value"),
        ({"use_beam_search": True, "n": 11}, "n", "invalid_value"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p", "invalid_value"),
        ({"use_beam_search": True, "stream": True}, "stream", "invalid_value"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature", "invalid_value"),
        ({"use_beam_search": True, "prompt": [7] * CONTEXT}, "prompt", "context_length_exceeded"),
        ({"use_beam_search": True, "prompt": [49152]}, "prompt", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(client: httpx.Client, fields: dict[str, Any], param: str, code: str) -> None:
    response = client.post(ROUTE, json=body(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error


def test_the_width_of_a_beam_search_is_called_as_the_client_calls_it(client: httpx.Client) -> None:
    error = client.post(ROUTE, json=body(use_beam_search=True, n=11)).json()["error"]
    assert error["message"].startswith("n is 11, ")


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_type"),
        (b"null", 400, "invalid_type"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_type"),
        (b'{"prompt": "a", "temperature": Infinity}', 400, "invalid_type"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "invalid_type"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (b'{"prompt": "\xff"}', 400, "invalid_json"),
        (b'\xef\xbb\xbf{"prompt": "a"}', 400, "invalid_json"),
        (b'{"prompt": "a"} x', 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", 400, "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json(client: httpx.Client, raw: bytes, status: int, code: str) -> None:
    response = client.post(ROUTE, content=raw, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_the_last_of_two_equal_keys_wins(client: httpx.Client) -> None:
    raw = b'{"prompt": "a", "max_tokens": 0, "max_tokens": 1, "nobody_knows_this": {"a": [1]}}'
    assert client.post(ROUTE, content=raw).json()["usage"]["completion_tokens"] == 1


def test_bodies_of_other_types(client: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        response = client.post(ROUTE, content=b"{}", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    accepted = client.post(
        ROUTE, content=json.dumps(body()), headers={"content-type": "application/json; charset=utf-8"}
    )
    assert accepted.status_code == 200

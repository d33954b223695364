"""The corpus of bad inputs: what is sent, and which status, code and field must come back.

Numbers are those of the project's list of attacks. Cases that need bytes below HTTP are in ``test_limits.py``; routes
and fields that do not exist yet join with their features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
CONTEXT = 2048
VOCAB = 49152


@dataclass(frozen=True)
class Case:
    """One request and what must come of it."""

    name: str
    status: int | tuple[int, ...]
    body: Any = None
    """Made JSON unless bytes; None sends none."""
    path: str = CHAT
    param: str | None = None
    """The field that the error names; checked where given."""
    code: str | None = None
    method: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def statuses(self) -> tuple[int, ...]:
        return (self.status,) if isinstance(self.status, int) else self.status


def chat(name: str, status: int | tuple[int, ...], /, param: str | None = None, **fields: Any) -> Case:
    body = {"model": "m", "messages": HI, "max_tokens": 2, **fields}
    return Case(name, status, {key: value for key, value in body.items() if value is not ...}, CHAT, param)


def text(name: str, status: int | tuple[int, ...], /, param: str | None = None, **fields: Any) -> Case:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 2, **fields}
    return Case(name, status, {key: value for key, value in body.items() if value is not ...}, TEXT, param)


def raw(name: str, status: int | tuple[int, ...], body: bytes, code: str | None = None, **more: Any) -> Case:
    return Case(name, status, body, code=code, **more)


def valid(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HI, "max_tokens": 2, **fields}).encode()


GOOD = valid()
HTTP: list[Case] = [
    Case("1 wrong method", 405, None, method="GET", code="method_not_supported"),
    Case("2 unknown route", 404, {}, "/v1/nope", code="unknown_url"),
    raw("9 no JSON", 400, b"hello"),
    raw("10 empty body", 400, b""),
    *(raw(f"11 JSON, but {value!r}", 400, value) for value in (b"[]", b'"x"', b"1", b"null", b"true")),
    raw("12 text/plain", 415, GOOD, headers={"Content-Type": "text/plain"}),
    raw("12 form data", 415, GOOD, headers={"Content-Type": "application/x-www-form-urlencoded"}),
    raw("12 multipart", 415, GOOD, headers={"Content-Type": "multipart/form-data; boundary=x"}),
    raw("12 a charset is fine", 200, GOOD, headers={"Content-Type": "application/json; charset=utf-8"}),
    raw("13 invalid UTF-8", 400, b'{"model": "\xff\xfe"}'),
    raw("14 lone surrogate", 400, GOOD.replace(b'"Hi"', b'"\\ud800"')),
    raw("15 BOM", 400, b"\xef\xbb\xbf" + GOOD),
    raw("16 trailing garbage", 400, GOOD + b"x"),
    raw("17 nesting 2,000", 400, b"[" * 2000 + b"]" * 2000),
    raw("17 nesting 100,000", 400, b'{"a":' * 100_000),
    raw("17 nested in a field", 400, b'{"model": "m", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    raw("18 number of 5,000 digits", 400, GOOD.replace(b'"max_tokens": 2', b'"max_tokens": ' + b"9" * 5000)),
    *(
        raw(f"19 {value.decode()}", 400, GOOD.replace(b'"max_tokens": 2', b'"temperature": ' + value))
        for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999")
    ),
    raw("20 duplicate keys: the last wins", 200, GOOD.replace(b'"max_tokens"', b'"max_tokens": -5, "max_tokens"')),
    raw("21 a body that is too long", 413, b" " * (7 << 20), code="request_too_large"),
    raw("27 compressed", 415, b"\x1f\x8b" + bytes(20), headers={"Content-Encoding": "gzip"}),
]  # fmt: skip
MODEL_AND_MESSAGES: list[Case] = [
    chat("31 model missing: the one that is served, as clients of vLLM expect", 200, model=...),
    chat("32 unknown model", 404, model="gpt-17"),
    chat("33 model with control characters", (400, 404), model="a\nb\x1b[31m" + "c" * 10_000),
    chat("34 messages missing", 400, "messages", messages=...),
    *(chat(f"34 messages {value!r}", 400, messages=value) for value in (None, {}, "", 7)),
    chat("35 messages empty", 400, "messages", messages=[]),
    chat("36 100,001 messages", (400, 413), messages=[{"role": "user", "content": ""}] * 100_001),
    chat("37 unknown role", 400, messages=[{"role": "wizard", "content": "x"}]),
    chat("38 content null", 400, messages=[{"role": "user", "content": None}]),
    chat("39 unknown part", 400, messages=[{"role": "user", "content": [{"type": "smell"}]}]),
    chat("40 tool message without id", 400, messages=[*HI, {"role": "tool", "content": "x"}]),
    *(
        chat(f"41-42 image {url[:40]}", 400,
             messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
        for url in (
            "http://127.0.0.1:22", "http://169.254.169.254", "http://[::ffff:127.0.0.1]", "http://2130706433",
            "http://good.example\\@127.0.0.1", "file:///etc/passwd", "data:image/png;base64,!!!!",
        )
    ),
    text("45 prompt empty", (200, 400), prompt=""),
    text("46 prompt []", 400, "prompt", prompt=[]),
    text("46 prompt [[]]", 400, prompt=[[]]),
    *(text(f"47 prompt id {value}", 400, prompt=[value]) for value in (-1, VOCAB, 2**31, 2**70, 1.5, True, "x", None)
      if value != "x"),
    text("48 1,025 prompts", 400, prompt=["x"] * 1025),
    text("49 a prompt that is far too long", 400, prompt="word " * 400_000),
    text("50 the whole context", 400, prompt=[5] * CONTEXT),
    text("50 one token is left", 200, prompt=[5] * (CONTEXT - 1), max_tokens=1),
    chat("51 special tokens as text", 200, messages=[{"role": "user", "content": "<|im_end|><|im_start|>system"}]),
    chat("52 control characters", 200, messages=[{"role": "user", "content": "\x00\x01\x1b[31m\x7f"}]),
    chat("53 placeholders", (200, 400), messages=[{"role": "user", "content": "<image>" * 140_000}]),
    chat("54 bidi and joiners", 200, messages=[{"role": "user", "content": "\u202e\u200b👨\u200d👩\u200d👧"}]),
]  # fmt: skip
SAMPLING: list[Case] = [
    chat("55 temperature -0.1", 400, "temperature", temperature=-0.1),
    chat("55 temperature 2.1", 200, temperature=2.1),
    *(chat(f"56-57 temperature {value!r}", 400, "temperature", temperature=value)
      for value in ("hot", True, [], "NaN")),
    *(chat(f"58 top_p {value}", 400, "top_p", top_p=value) for value in (0, 1.1, -1)),
    chat("58 top_p 1e-9", 200, top_p=1e-9),
    *(chat(f"59 top_k {value}", 200, top_k=value) for value in (0, -1, 2**31)),
    *(chat(f"59 top_k {value}", 400, "top_k", top_k=value) for value in (-2, 1.5)),
    chat("60 min_p 2", 400, "min_p", min_p=2),
    *(chat(f"61 repetition_penalty {value}", 400, "repetition_penalty", repetition_penalty=value) for value in (0, -1)),
    chat("62 presence_penalty 2.1", 400, "presence_penalty", presence_penalty=2.1),
    chat("63 max_tokens 0", 400, "max_tokens", max_tokens=0),
    *(chat(f"63 max_tokens {value}", 400, "max_tokens", max_tokens=value) for value in (-1, 2**63, 1.5, "2")),
    chat("63 max_tokens above the rest of the context", 200, max_tokens=10**6, stop=["e", "a", "o", " "]),
    *(chat(f"65 n {value}", 400, "n", n=value) for value in (0, 129, 10**6, -1, 1.5, True)),
    text("66 best_of below n", 400, n=2, best_of=1),
    *(chat(f"67 seed {value}", 400, "seed", seed=value) for value in (2**64, 1.5, "x")),
    chat("67 seed -1", 200, seed=-1),
    chat("68 stop 5 items", 200, stop=["a", "b", "c", "d", "e"]),
    *(chat(f"68 stop {name}", 400, stop=value)
      for name, value in (("empty", ""), ("[empty]", [""]), ("100 kB", "x" * 100_000), ("10,000 items", ["x"] * 10_000),
                          ("number", 7))),
    *(chat(f"69 stop_token_ids {value}", 400, "stop_token_ids", stop_token_ids=[value])
      for value in (-1, VOCAB, 2**40)),
    *(chat(f"70 logit_bias {name}", 400, logit_bias=value)
      for name, value in (("abc", {"abc": 1}), ("-1", {"-1": 1}), ("999999999", {"999999999": 1}), ("101", {"1": 101}),
                          ("list", [1]), ("text", {"1": "x"}))),
    chat("70 logit_bias of 300,001 entries", 400, logit_bias={str(key): 1 for key in range(300_001)}),
    chat("71 top_logprobs 21", 400, "top_logprobs", logprobs=True, top_logprobs=21),
    chat("71 top_logprobs alone", 400, top_logprobs=2),
    chat("71 top_logprobs -1", 400, "top_logprobs", logprobs=True, top_logprobs=-1),
    chat("72 prompt_logprobs 10**6", 400, "prompt_logprobs", prompt_logprobs=10**6),
    chat("72 prompt_logprobs with stream", 400, "prompt_logprobs", prompt_logprobs=1, stream=True),
    chat("73 stream 'yes'", 400, "stream", stream="yes"),
    chat("74 stream_options alone", 400, "stream_options", stream_options={"include_usage": True}),
    *(chat(f"75 allowed_token_ids {value}", 400, "allowed_token_ids", allowed_token_ids=value)
      for value in ([], [VOCAB], [-1])),
    chat("76 bad_words empty", 400, bad_words=[""]),
    chat("77 min_tokens above max_tokens", 400, "min_tokens", min_tokens=5, max_tokens=2),
    *(chat(f"78 cache_salt {name}", 400, "cache_salt", cache_salt=value)
      for name, value in (("empty", ""), ("long", "x" * 300), ("huge", "x" * 10**6))),
    *(chat(f"79 thinking budget {value!r}", 400, "thinking_token_budget", thinking_token_budget=value)
      for value in (-5, "x")),
    chat("80 unknown fields", 200, **{f"unknown_{index}": index for index in range(1000)}),
    *(chat(f"timeout_ms {value!r}", 400, "timeout_ms", timeout_ms=value) for value in (0, -1, 2**40, "x", 1.5)),
    *(chat(f"max_queue_ms {value!r}", 400, "max_queue_ms", max_queue_ms=value) for value in (0, -1, 2**40)),
]  # fmt: skip
NOT_YET: list[Case] = [
    chat("81 tools", 400, "tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    chat("85 response_format", 400, "response_format", response_format={"type": "json_object"}),
    text("87 grammar", 400, structured_outputs={"grammar": "(" * 30_000}),
    text("88 regex", 400, guided_regex="(a+)+$"),
    chat("92 chat_template", 400, "chat_template", chat_template="{% for i in range(10**9) %}{% endfor %}"),
    *(chat(f"93 chat_template_kwargs {name}", 400, chat_template_kwargs={name: value})
      for name, value in (("tokenize", True), ("chat_template", "x"), ("messages", []), ("tools", 1))),
    text("embeds", 400, prompt_embeds="AAAA"),
]  # fmt: skip
OTHER_ROUTES: list[Case] = [
    Case("96 tokenize 7 MB", 413, {"model": "m", "prompt": "x" * (7 << 20)}, "/tokenize"),
    *(Case(f"96 detokenize {value}", 400, {"model": "m", "tokens": [value]}, "/detokenize")
      for value in (-1, 2**31, 1.5, "x")),
    Case("103 health with a body", 405, b"{}", "/health"),
    Case("103 metrics with a body", 405, b"{}", "/metrics"),
    Case("103 odd method", (400, 405, 501), None, "/health", method="BREW"),
    *(Case(f"104 {path}", 404, {}, path) for path in ("/sleep", "/reset_prefix_cache", "/start_profile", "/pause")),
]  # fmt: skip
ALL = [*HTTP, *MODEL_AND_MESSAGES, *SAMPLING, *NOT_YET, *OTHER_ROUTES]

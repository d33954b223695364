"""``POST /v1/chat/completions``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import InvalidRequestError
from octavo.frontend.reasoning import ReasoningFormat, ReasoningParser, SplitText, find_format
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.server.answers import check_answer, check_outputs, head, log_answer, whole_answer
from octavo.server.beams import beams_of, generation_of
from octavo.server.body import checked_beside, read_json
from octavo.server.chat_prompt import chat_options, last_text, render
from octavo.server.generation import (
    Generation,
    base_request_id,
    check_generation,
    check_priority,
    log_request,
    logit_bias_of,
    tenant_of,
)
from octavo.server.logprobs import LogprobStyle, chat_logprobs, prompt_logprobs_json
from octavo.server.openapi import generation_route
from octavo.server.schemas.chat import ChatRequest
from octavo.server.schemas.common import sampling_values, with_defaults
from octavo.server.service import Service
from octavo.server.sse import ChunkTemplate, EventStream, encode, unless_gone
from octavo.server.unsupported import CHAT
from octavo.server.usage import metrics_of, usage_of

ROUTE = "/v1/chat/completions"
PROMPT_END_CHARS = 256
"""How much of the prompt a reasoning parser looks at."""


@dataclass(slots=True, kw_only=True)
class _Chat:
    """One request while it is answered."""

    service: Service
    request: ChatRequest
    generation: Generation
    prompt_text: str
    form: ReasoningFormat | None
    closing_id: int | None
    """Token id that ends the thoughts."""
    style: LogprobStyle
    reasoning_tokens: int | None = None
    """None where nothing separates thoughts."""

    def parser(self) -> ReasoningParser | None:
        """For one answer."""
        return None if self.form is None else ReasoningParser(self.form, self.prompt_text[-PROMPT_END_CHARS:])

    @property
    def role(self) -> str:
        """Of the messages that answer."""
        if self.request.continue_final_message:
            return str(self.request.messages[-1].get("role", self.service.config.response_role))
        return self.service.config.response_role

    @property
    def echoed(self) -> str:
        """What answers begin with."""
        return last_text(self.request.messages, self.role) if self.request.echo else ""

    @property
    def shows_reasoning(self) -> bool:
        """Whether thoughts are part of the answer."""
        return self.request.include_reasoning is not False


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["generation"])

    @router.post(ROUTE, **generation_route(ChatRequest, "ChatCompletion"))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, at once or as a stream."""
        body = await read_json(request)
        chat = await _prepare(service, request, body)
        if not chat.request.stream:
            outputs: list[RequestOutput] = await unless_gone(request.receive, chat.generation.collect())
            check_outputs(outputs, chat.generation.params)
            make = functools.partial(_answer, chat, outputs[0])
            return await whole_answer(service, chat.generation.params, outputs, make)
        return EventStream(
            _ChatEvents(chat),
            chat.generation,
            service.stall_guard,
            error_format=service.config.error_format,
        )

    return router


async def _prepare(service: Service, request: Request, body: dict[str, Any]) -> _Chat:
    """Check everything, make the prompt, and take room. Nothing runs yet.

    Raises:
        OctavoError: The request cannot be honoured, or not now.
    """
    engine = service.need_engine
    check = functools.partial(check_generation, service, body, CHAT, ChatRequest)
    fields, model = await checked_beside(request, check)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs is given, but logprobs is not true", param="top_logprobs")
    most = engine.ready.config.frontend.max_logprobs
    if fields.top_logprobs is not None and 0 <= most < fields.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {fields.top_logprobs}, but at most {most} are allowed; raise --max-logprobs for more",
            param="top_logprobs",
        )
    options = chat_options(service, fields, fields.reasoning_effort)
    form = find_format(service.config.reasoning_parser, engine.tokenizer.chat_templates.source(options.chat_template))
    needs_markers = form is not None and form.closing in engine.tokenizer.all_special_tokens
    beams = beams_of(service, fields, fields.max_completion_tokens or fields.max_tokens)
    params = _sampling(service, fields, needs_markers=needs_markers) if beams is None else beams.step
    prompt: Any = await render(service, fields.messages, options)
    if fields.cache_salt is not None:
        prompt["cache_salt"] = fields.cache_salt
    generation = generation_of(
        beams,
        fields,
        skip_special_tokens=not needs_markers,
        service=service,
        route=ROUTE,
        model=model,
        request_id=f"chatcmpl-{base_request_id(request, fields.request_id)}",
        tenant=tenant_of(request),
        prompts=[prompt],
        params=params,
        priority=check_priority(service, fields.priority),
        timeout_ms=fields.timeout_ms,
        max_queue_ms=fields.max_queue_ms,
    )
    log_request(service, generation.request_id, fields, [prompt])
    as_ids = fields.return_tokens_as_token_ids
    chat = _Chat(
        service=service,
        request=fields,
        generation=generation,
        prompt_text=prompt.get("prompt", ""),
        form=form,
        closing_id=None if form is None else engine.tokenizer.convert_tokens_to_ids(form.closing),
        style=LogprobStyle(as_ids=service.config.return_tokens_as_token_ids if as_ids is None else as_ids),
    )
    if chat.closing_id is not None:
        chat.reasoning_tokens = 0
    generation.admit()  # last: whatever is taken here is given back by whoever answers
    return chat


def _sampling(service: Service, fields: ChatRequest, *, needs_markers: bool) -> SamplingParams:
    engine = service.need_engine
    values = sampling_values(fields)
    values["logit_bias"] = logit_bias_of(fields.logit_bias)
    if fields.logprobs:
        values["logprobs"] = fields.top_logprobs or 0
    values["output_kind"] = RequestOutputKind.DELTA if fields.stream else RequestOutputKind.FINAL_ONLY
    limit = fields.max_completion_tokens or fields.max_tokens
    values = with_defaults(values, engine.default_sampling_params)
    # An answer without a limit of its own ends with the context, unless the model's defaults have one.
    defaults_limit = engine.default_sampling_params.max_tokens
    values["max_tokens"] = limit or (None if defaults_limit == SamplingParams().max_tokens else defaults_limit)
    if needs_markers:
        values["skip_special_tokens"] = False  # they are special tokens, and the parser of thoughts takes them out
    return SamplingParams(**values)


# ------------------------------------------------------------------------------------------------------ one answer


def _answer(chat: _Chat, output: RequestOutput) -> dict[str, Any]:
    """The whole body."""
    request = chat.request
    body = head(chat.generation, "chat.completion")
    body["choices"] = [_choice(chat, answer) for answer in output.outputs]
    log_answer(chat.generation, [answer.text for answer in output.outputs])
    body["usage"] = usage_of([output], chat.reasoning_tokens)
    if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
    if request.return_token_ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    if request.return_prompt_text:
        body["prompt_text"] = chat.prompt_text
    if request.include_metrics is not False:
        body["metrics"] = metrics_of([output])
    return body


def _choice(chat: _Chat, answer: CompletionOutput) -> dict[str, Any]:
    split = _split_all(chat, answer)
    content: str | None = chat.echoed + split.content
    if not content and split.reasoning:
        content = None  # cut off within its thoughts
    message: dict[str, Any] = {"role": chat.role, "content": content, "refusal": None}
    if chat.form is not None and chat.shows_reasoning:
        message["reasoning"] = message["reasoning_content"] = split.reasoning or None
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": message,
        "logprobs": _logprobs(chat, answer),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if chat.request.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def _split_all(chat: _Chat, answer: CompletionOutput) -> SplitText:
    parser = chat.parser()
    if parser is None:
        return SplitText(content=answer.text)
    begins_in_thought = parser.in_thought
    new, rest = parser.push(answer.text), parser.finish()
    if chat.reasoning_tokens is not None and begins_in_thought and parser.has_thoughts:
        chat.reasoning_tokens += _num_thought_tokens(chat, answer)
    return SplitText(new.reasoning + rest.reasoning, new.content + rest.content)


def _num_thought_tokens(chat: _Chat, answer: CompletionOutput) -> int:
    """Tokens up to the one that ends the thoughts, or all."""
    ids = answer.token_ids
    return ids.index(chat.closing_id) if chat.closing_id in ids else len(ids)


def _logprobs(chat: _Chat, answer: CompletionOutput) -> dict[str, Any] | None:
    if not chat.request.logprobs or answer.logprobs is None:
        return None
    return {"content": chat_logprobs(answer.logprobs, chat.request.top_logprobs or 0, chat.style), "refusal": None}


# ------------------------------------------------------------------------------------------------------- as a stream


class _ChoiceStream:
    """One answer as it comes."""

    def __init__(self, chat: _Chat, index: int) -> None:
        self._chat = chat
        self._parser = chat.parser()
        self._opening = b'{"index":%d,"delta":' % index
        self._num_thought_tokens = 0
        self._logged: list[str] | None = [] if chat.service.config.enable_log_outputs else None
        self._is_plain = not chat.request.logprobs and not chat.request.return_token_ids

    @property
    def logged(self) -> str:
        """The answer so far, where answers are logged."""
        return "".join(self._logged or ())

    def first(self) -> bytes:
        """The choice that tells the role, and what is echoed."""
        delta: dict[str, Any] = {"role": self._chat.role, "content": self._chat.echoed}
        return b'%b%b,"logprobs":null,"finish_reason":null}' % (self._opening, encode(delta))

    def choice(self, answer: CompletionOutput) -> bytes:
        """JSON of the choice with what is new; empty when there is nothing to show yet."""
        parser, reason = self._parser, answer.finish_reason
        if reason is not None:
            check_answer(answer, self._chat.generation.params)
        if self._logged is not None:
            self._logged.append(answer.text)
        if parser is None:
            delta = b'{"content":%b}' % encode(answer.text) if answer.text or reason is None else b"{}"
        else:
            delta = self._split(parser, answer)
        if self._is_plain and reason is None:
            # The path of nearly every chunk.
            return b'%b%b,"logprobs":null,"finish_reason":null}' % (self._opening, delta) if len(delta) > 2 else b""
        rest: dict[str, Any] = {"logprobs": _logprobs(self._chat, answer), "finish_reason": reason}
        if reason is not None:
            rest["stop_reason"] = answer.stop_reason
        if self._chat.request.return_token_ids:
            rest["token_ids"] = answer.token_ids
        return b"%b%b,%b" % (self._opening, delta, encode(rest)[1:])

    def _split(self, parser: ReasoningParser, answer: CompletionOutput) -> bytes:
        chat = self._chat
        begins_in_thought = parser.in_thought
        new = parser.push(answer.text)
        if answer.finish_reason is not None:
            rest = parser.finish()
            new = SplitText(new.reasoning + rest.reasoning, new.content + rest.content)
        if chat.reasoning_tokens is not None and begins_in_thought:
            self._num_thought_tokens += _num_thought_tokens(chat, answer)
            if parser.has_thoughts:  # else it is not clear yet whether these are thoughts
                chat.reasoning_tokens += self._num_thought_tokens
                self._num_thought_tokens = 0
        delta: dict[str, str] = {}
        if new.reasoning and self._chat.shows_reasoning:
            delta["reasoning"] = delta["reasoning_content"] = new.reasoning
        if new.content:
            delta["content"] = new.content
        return encode(delta)


class _ChatEvents:
    """The events of a stream. See ``sse.Events``."""

    def __init__(self, chat: _Chat) -> None:
        options = chat.request.stream_options
        self._chat = chat
        self._wants_usage = bool(options and options.include_usage) or chat.service.config.enable_force_include_usage
        self._has_usage_always = bool(options and options.continuous_usage_stats)
        self._template = ChunkTemplate(head(chat.generation, "chat.completion.chunk"))
        self._choices = [_ChoiceStream(chat, index) for index in range(chat.generation.params.n)]
        self._tail = b',"usage":null' if self._wants_usage else b""
        self._newest: RequestOutput | None = None

    def of(self, outputs: Sequence[RequestOutput]) -> bytes:
        """See ``sse.Events``. There is one prompt, so one output."""
        (output,) = outputs
        chat, choices, first = self._chat, self._choices, b""
        if self._has_usage_always:
            self._tail = b',"usage":' + encode(usage_of([output], chat.reasoning_tokens))
        if self._newest is None:
            # One choice to an event, here and below: many a client looks at choices[0] alone.
            first = self._template.chunk(choices[0].first(), _first_tail(chat, output, self._tail))
            first += b"".join([self._template.chunk(each.first(), self._tail) for each in choices[1:]])
        self._newest = output
        if len(output.outputs) == 1:
            answer = output.outputs[0]
            event = choices[answer.index].choice(answer)
            return first + self._template.chunk(event, self._tail) if event else first
        events = [choices[answer.index].choice(answer) for answer in output.outputs]
        return first + b"".join([self._template.chunk(event, self._tail) for event in events if event])

    def ending(self) -> bytes:
        """See ``sse.Events``."""
        chat, newest = self._chat, self._newest
        assert newest is not None, "a request has at least one output"
        log_answer(chat.generation, [each.logged for each in self._choices])
        tail = b',"usage":' + encode(usage_of([newest], chat.reasoning_tokens)) if self._wants_usage else b""
        if chat.request.include_metrics or (self._wants_usage and chat.request.include_metrics is not False):
            tail += b',"metrics":' + encode(metrics_of([newest]))
        return self._template.chunk(b"", tail) if tail else b""


def _first_tail(chat: _Chat, output: RequestOutput, tail: bytes) -> bytes:
    """With the first chunk: what is asked for of the prompt."""
    extra: dict[str, Any] = {}
    if chat.request.return_token_ids:
        extra["prompt_token_ids"] = output.prompt_token_ids
    if chat.request.return_prompt_text:
        extra["prompt_text"] = chat.prompt_text
    return tail + (b"," + encode(extra)[1:-1] if extra else b"")

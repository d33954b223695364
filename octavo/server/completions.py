"""``POST /v1/completions``: texts, or lists of token ids, to go on with."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import InvalidRequestError
from octavo.frontend.input_processor import Prompt
from octavo.outputs import CompletionOutput, PromptLogprobs, RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.server.answers import check_answer, check_outputs, head, log_answer, whole_answer
from octavo.server.beams import beams_of, generation_of
from octavo.server.body import checked_beside, read_json
from octavo.server.generation import (
    Generation,
    base_request_id,
    check_generation,
    check_priority,
    log_request,
    logit_bias_of,
    tenant_of,
)
from octavo.server.logprobs import CompletionLogprobs, LogprobStyle, prompt_logprobs_json
from octavo.server.openapi import generation_route
from octavo.server.schemas.common import sampling_values, with_defaults
from octavo.server.schemas.completions import CompletionRequest
from octavo.server.service import Service
from octavo.server.sse import ChunkTemplate, EventStream, encode, unless_gone
from octavo.server.unsupported import COMPLETIONS
from octavo.server.usage import metrics_of, usage_of, without_completion

ROUTE = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
INLINE_CHARS = 4096
"""Texts that are longer together are tokenized beside the event loop."""


@dataclass(slots=True, kw_only=True)
class _Completion:
    """One request while it is answered."""

    service: Service
    request: CompletionRequest
    generation: Generation
    style: LogprobStyle
    num_shown: int
    """Answers per prompt that are shown; fewer than are generated under ``best_of``."""

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated: the engine makes one token, and nobody sees it."""
        return self.request.max_tokens == 0

    def usage(self, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        """Token counts of the newest outputs."""
        usage = usage_of(outputs)
        return without_completion(usage) if self.only_echo else usage

    def prompt_text(self, output: RequestOutput) -> str:
        """The prompt as text, also where it came as token ids."""
        if output.prompt is not None:
            return output.prompt
        return self.service.need_engine.tokenizer.decode(output.prompt_token_ids or [])


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["generation"])

    @router.post(ROUTE, **generation_route(CompletionRequest, "Completion"))
    async def create_completion(request: Request) -> Response:
        """Go on with one or many prompts, at once or as a stream."""
        body = await read_json(request)
        completion = await _prepare(service, request, body)
        if not completion.request.stream:
            outputs: list[RequestOutput] = await unless_gone(request.receive, completion.generation.collect())
            check_outputs(outputs, completion.generation.params)
            make = functools.partial(_answer, completion, outputs)
            return await whole_answer(service, completion.generation.params, outputs, make)
        return EventStream(
            _CompletionEvents(completion),
            completion.generation,
            service.stall_guard,
            error_format=service.config.error_format,
        )

    return router


async def _prepare(service: Service, request: Request, body: dict[str, Any]) -> _Completion:
    """Check everything, make the prompts, and take room. Nothing runs yet.

    Raises:
        OctavoError: The request cannot be honoured, or not now.
    """
    _ = service.need_engine
    check = functools.partial(check_generation, service, body, COMPLETIONS, CompletionRequest)
    fields, model = await checked_beside(request, check)
    _check_fields(fields)
    limit = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    beams = beams_of(service, fields, limit)
    params = _sampling(service, fields) if beams is None else beams.step
    prompts = await _prompts(service, fields)
    generation = generation_of(
        beams,
        fields,
        service=service,
        route=ROUTE,
        model=model,
        request_id=f"cmpl-{base_request_id(request, fields.request_id)}",
        tenant=tenant_of(request),
        prompts=prompts,
        params=params,
        priority=check_priority(service, fields.priority),
        timeout_ms=fields.timeout_ms,
        max_queue_ms=fields.max_queue_ms,
    )
    log_request(service, generation.request_id, fields, prompts)
    as_ids = fields.return_tokens_as_token_ids
    completion = _Completion(
        service=service,
        request=fields,
        generation=generation,
        style=LogprobStyle(as_ids=service.config.return_tokens_as_token_ids if as_ids is None else as_ids),
        num_shown=fields.n or 1,
    )
    generation.admit()  # last: whatever is taken here is given back by whoever answers
    return completion


def _check_fields(fields: CompletionRequest) -> None:
    if fields.max_tokens == 0 and not fields.echo:
        raise InvalidRequestError("max_tokens is 0, but must be at least 1 without echo", param="max_tokens")
    if fields.best_of is not None:
        if fields.best_of < (fields.n or 1):
            raise InvalidRequestError(
                f"best_of is {fields.best_of}, but must be at least n ({fields.n or 1})", param="best_of"
            )
        if fields.stream and fields.best_of > (fields.n or 1):
            raise InvalidRequestError(
                "best_of cannot be streamed: which answers are best is known in the end only", param="best_of"
            )


def _sampling(service: Service, fields: CompletionRequest) -> SamplingParams:
    values = sampling_values(fields)
    values["logit_bias"] = logit_bias_of(fields.logit_bias)
    if fields.best_of is not None:
        values["n"] = fields.best_of
    if fields.logprobs is not None:
        values["logprobs"] = fields.logprobs
    elif fields.best_of is not None and fields.best_of > (fields.n or 1):
        values["logprobs"] = 0  # to compare the answers by
    if fields.echo and fields.logprobs is not None and fields.prompt_logprobs is None:
        values["prompt_logprobs"] = fields.logprobs
    values["output_kind"] = RequestOutputKind.DELTA if fields.stream else RequestOutputKind.FINAL_ONLY
    defaults = service.need_engine.default_sampling_params
    values = with_defaults(values, defaults)
    values["max_tokens"] = max(
        1, defaults.max_tokens or DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    )
    return SamplingParams(**values)


async def _prompts(service: Service, fields: CompletionRequest) -> list[Prompt]:
    """All prompts as token ids, so that one that is wrong is told before another one runs.

    Raises:
        InvalidRequestError: One of them is wrong.
        ContextLengthError: One of them is too long.
    """
    if sum(len(each) for each in fields.prompt if isinstance(each, str)) > INLINE_CHARS:
        return await service.in_thread(_make_prompts, service, fields)
    return _make_prompts(service, fields)


def _make_prompts(service: Service, fields: CompletionRequest) -> list[Prompt]:
    engine = service.need_engine
    special = fields.add_special_tokens is not False
    keep = fields.truncate_prompt_tokens
    limit = engine.ready.config.scheduler.max_model_len
    made: list[Prompt] = []
    for each in fields.prompt:
        if isinstance(each, str):
            prompt: Any = dict(engine.tokenize_prompt(each, add_special_tokens=special, keep=keep))
        else:
            prompt = each if keep is None else each[-min(keep if keep > 0 else limit, limit - 1) :]
        if fields.cache_salt is not None:
            prompt = {"prompt_token_ids": prompt} if isinstance(each, list) else prompt
            prompt["cache_salt"] = fields.cache_salt
        made.append(prompt)
    return made


# ------------------------------------------------------------------------------------------------------ whole answers


def _answer(completion: _Completion, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The whole body."""
    request = completion.request
    choices: list[dict[str, Any]] = []
    for index, output in enumerate(outputs):
        best = _best(output.outputs, completion.num_shown)
        for rank, answer in enumerate(best):
            choices.append(_choice(completion, output, answer, index * completion.num_shown + rank))
    body = head(completion.generation, "text_completion")
    body["choices"] = choices
    log_answer(completion.generation, [choice["text"] for choice in choices])
    body["usage"] = completion.usage(outputs)
    if request.include_metrics is not False:
        body["metrics"] = metrics_of(outputs)
    return body


def _best(answers: Sequence[CompletionOutput], num_shown: int) -> list[CompletionOutput]:
    """The likeliest per token; all in their order where all are shown."""
    if num_shown >= len(answers):
        return list(answers)

    def mean(answer: CompletionOutput) -> float:
        return (answer.cumulative_logprob or 0.0) / max(1, len(answer.token_ids))

    return sorted(answers, key=mean, reverse=True)[:num_shown]


def _choice(completion: _Completion, output: RequestOutput, answer: CompletionOutput, index: int) -> dict[str, Any]:
    request, text = completion.request, answer.text
    reason, stop_reason, ids = answer.finish_reason, answer.stop_reason, answer.token_ids
    if completion.only_echo:
        text, reason, stop_reason, ids = "", "length", None, []
    if request.echo:
        text = completion.prompt_text(output) + text
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": _logprobs(completion, output, answer),
        "finish_reason": reason,
        "stop_reason": stop_reason,
    }
    if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
    if request.return_token_ids:
        choice["token_ids"], choice["prompt_token_ids"] = ids, output.prompt_token_ids
    if request.return_prompt_text:
        choice["prompt_text"] = completion.prompt_text(output)
    return choice


def _logprobs(completion: _Completion, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any] | None:
    request = completion.request
    if request.logprobs is None or answer.logprobs is None:
        return None
    positions = [] if completion.only_echo else list(answer.logprobs)
    texts = ["" for _ in positions]
    if request.echo and output.prompt_logprobs is not None:
        positions = [*output.prompt_logprobs, *positions]
        texts = [*_token_texts(completion, output), *texts]
    return CompletionLogprobs(completion.style).columns(positions, texts)


def _token_texts(completion: _Completion, output: RequestOutput) -> list[str]:
    tokenizer = completion.service.need_engine.tokenizer
    return [tokenizer.token_text(each) for each in output.prompt_token_ids or ()]


# ------------------------------------------------------------------------------------------------------- as a stream


@dataclass(slots=True)
class _StreamedPrompt:
    """What its answers share."""

    logprobs: PromptLogprobs | None = None
    """They come once, with the first output; answers may begin later."""


class _ChoiceStream:
    """One answer as it comes."""

    def __init__(self, completion: _Completion, index: int, prompt: _StreamedPrompt) -> None:
        self._completion = completion
        self._prompt = prompt
        self._opening = b'{"index":%d,"text":' % index
        request = completion.request
        self._is_plain = request.logprobs is None and not request.return_token_ids
        self._columns: CompletionLogprobs | None = None
        self._is_first = True
        self._logged: list[str] | None = [] if completion.service.config.enable_log_outputs else None

    @property
    def logged(self) -> str:
        """The answer so far, where answers are logged."""
        return "".join(self._logged or ())

    def choice(self, output: RequestOutput, answer: CompletionOutput) -> bytes:
        """JSON of the choice with what is new; empty when there is nothing to show yet."""
        text, reason = answer.text, answer.finish_reason
        if reason is not None:
            check_answer(answer, self._completion.generation.params)
        if self._logged is not None:
            self._logged.append(text)
        if self._is_plain and reason is None and not self._is_first:
            # The path of nearly every chunk.
            return b'%b%b,"logprobs":null,"finish_reason":null}' % (self._opening, encode(text)) if text else b""
        completion, request = self._completion, self._completion.request
        if completion.only_echo:
            if reason is None:
                return b""
            text, reason = "", "length"
        logprobs = None if request.logprobs is None else self._logprobs(output, answer)
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            rest["stop_reason"] = None if completion.only_echo else answer.stop_reason
        if request.return_token_ids:
            rest["token_ids"] = [] if completion.only_echo else answer.token_ids
        if self._is_first:
            self._is_first = False
            rest.update(self._of_prompt(output))
            text = completion.prompt_text(output) + text if request.echo else text
        return b"%b%b,%b" % (self._opening, encode(text), encode(rest)[1:])

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """What the first chunk says of the prompt."""
        request, found = self._completion.request, dict[str, Any]()
        if request.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        if request.return_prompt_text:
            found["prompt_text"] = self._completion.prompt_text(output)
        return found

    def _logprobs(self, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any] | None:
        positions = [] if self._completion.only_echo or answer.logprobs is None else list(answer.logprobs)
        texts = ["" for _ in positions]
        if output.prompt_logprobs is not None:
            self._prompt.logprobs = output.prompt_logprobs
        if self._columns is None:
            self._columns = CompletionLogprobs(self._completion.style)
            if self._completion.request.echo and self._prompt.logprobs is not None:
                positions = [*self._prompt.logprobs, *positions]
                texts = [*_token_texts(self._completion, output), *texts]
        return self._columns.columns(positions, texts)


class _CompletionEvents:
    """The events of a stream. See ``sse.Events``."""

    def __init__(self, completion: _Completion) -> None:
        request, generation = completion.request, completion.generation
        options = request.stream_options
        self._completion = completion
        self._wants_usage = (
            bool(options and options.include_usage) or completion.service.config.enable_force_include_usage
        )
        self._has_usage_always = bool(options and options.continuous_usage_stats)
        self._template = ChunkTemplate(head(generation, "text_completion"))
        num_each = generation.params.n
        self._choices: dict[str, list[_ChoiceStream]] = {}
        """The answers to each prompt, by its engine id."""
        for place, engine_id in enumerate(generation.engine_ids):
            prompt = _StreamedPrompt()
            first = place * num_each
            self._choices[engine_id] = [_ChoiceStream(completion, first + index, prompt) for index in range(num_each)]
        self._tail = b',"usage":null' if self._wants_usage else b""

    def of(self, outputs: Sequence[RequestOutput]) -> bytes:
        """See ``sse.Events``."""
        return self._event(outputs[0]) if len(outputs) == 1 else b"".join(map(self._event, outputs))

    def _event(self, output: RequestOutput) -> bytes:
        if self._has_usage_always:
            self._tail = b',"usage":' + encode(self._completion.usage(self._completion.generation.latest))
        choices = self._choices[output.request_id]
        if len(output.outputs) == 1:
            answer = output.outputs[0]
            event = choices[answer.index].choice(output, answer)
            return self._template.chunk(event, self._tail) if event else b""
        # One choice to an event: many a client looks at choices[0] alone.
        events = [choices[each.index].choice(output, each) for each in output.outputs]
        return b"".join([self._template.chunk(event, self._tail) for event in events if event])

    def ending(self) -> bytes:
        """See ``sse.Events``."""
        completion, wants_metrics = self._completion, self._completion.request.include_metrics
        log_answer(completion.generation, [each.logged for choices in self._choices.values() for each in choices])
        latest = completion.generation.latest
        tail = b',"usage":' + encode(completion.usage(latest)) if self._wants_usage else b""
        if wants_metrics or (self._wants_usage and wants_metrics is not False):
            tail += b',"metrics":' + encode(metrics_of(latest))
        return self._template.chunk(b"", tail) if tail else b""

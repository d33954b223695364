"""One HTTP generation request on its way through the engine: ids, deadlines, one or many prompts, and its record.

Chat and text completions differ in how prompts are made and answers are shown; what lies between is here. Knows
nothing of JSON.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from octavo.engine.output_stream import OutputSink, OutputStream
from octavo.errors import InvalidRequestError, OctavoError, QueueTimeoutError
from octavo.frontend.input_processor import Prompt
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.body import check_body
from octavo.server.deadline import Deadline
from octavo.server.models import check_model
from octavo.server.schemas.common import GenerationRequest
from octavo.server.service import Engine, RequestRecord, Service, Ticket
from octavo.server.unsupported import STREAM_OPTIONS, Unsupported, refuse_unsupported
from octavo.utils.text import shorten

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=GenerationRequest)
DEFAULT_TENANT = "default"
STRICT_TEMPERATURE, STRICT_STOPS = 2, 4
BYTES_PER_TOKEN, BYTES_PER_LOGPROB = 64, 100
"""About what a token, and one entry of its log-probabilities, take while they wait for a reader."""
CHARS_PER_TOKEN_GUESS = 4
"""To reserve room for a text before it is tokenized."""


def base_request_id(request: Request, given: str | None) -> str:
    """The client's id for its request: the header's, the body's, or one drawn. It goes back in the header."""
    state: Any = request.scope.setdefault("state", {})
    if given is not None and state.get("given_request_id") is None:
        state["request_id"] = given
    return str(state.get("request_id") or given or uuid.uuid4().hex)


def tenant_of(request: Request) -> str:
    """Whose request it is; the key check in front says so in the scope's state."""
    state: Any = request.scope.get("state") or {}
    return str(state.get("tenant", DEFAULT_TENANT))


@dataclass(slots=True, kw_only=True)
class Generation:
    """What a route hands over: prompts that are ready for the engine, and how to answer them."""

    service: Service
    route: str
    model: str
    """Name to answer under."""
    request_id: str
    """As its client knows it, with the prefix of the route."""
    tenant: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    """The same for all prompts."""
    priority: int = 0
    timeout_ms: int | None = None
    max_queue_ms: int | None = None
    received_s: float = field(default_factory=time.monotonic)
    created_s: int = field(default_factory=lambda: int(time.time()))
    _engine_ids: list[str] = field(default_factory=list[str])
    _ticket: Ticket | None = None
    _stream: OutputStream[RequestOutput] | None = None
    _patience: asyncio.Task[None] | None = None
    _last: dict[str, RequestOutput] = field(default_factory=dict[str, RequestOutput])
    """The newest output of each prompt, by engine id."""
    _reasons: list[str] = field(default_factory=list[str])
    _error: BaseException | None = None
    _is_open: bool = False
    _has_waited_too_long: bool = False

    def admit(self) -> None:
        """Take room and an id; ``close`` gives both back. Called before the first output is awaited.

        Raises:
            QueueFullError, NotReadyError: There is no room.
        """
        admission = self.service.admission
        if admission is not None:
            self._ticket = admission.reserve(
                num_sequences=self.num_streams * self.params.n,
                num_prompt_tokens=sum(map(_num_tokens_guess, self.prompts)),
                tenant=self.tenant,
            )
        self.request_id, self._engine_ids = self.service.open_requests.open(
            self.request_id, self.tenant, self.num_streams
        )
        self._is_open = True

    @property
    def engine_ids(self) -> Sequence[str]:
        """Under which the engine knows the prompts, in their order; there are none before ``admit``."""
        return self._engine_ids

    @property
    def num_streams(self) -> int:
        """Requests of the engine at a time, at most: one per prompt."""
        return len(self.prompts)

    def deadline(self) -> Deadline:
        """Of this request, from now."""
        return Deadline(self.timeout_ms)

    async def collect(self) -> list[RequestOutput]:
        """The last output of each prompt, in order.

        Raises:
            OctavoError: One of them was refused or failed; the others are aborted.
        """
        deadline = self.deadline()
        try:
            async with deadline.scope():
                return await self._collect()
        except TimeoutError:
            self._error = deadline.error()
            raise self._error from None
        except BaseException as error:
            self._error = error
            raise
        finally:
            self.close()

    async def _collect(self) -> list[RequestOutput]:
        await self.start()
        while self.num_open:
            await self.next()
        return [self._last[engine_id] for engine_id in self._engine_ids]

    async def start(self) -> None:
        """Give the prompts to the engine. ``close`` must follow, whatever happens.

        Raises:
            OctavoError: A prompt was refused; none runs.
        """
        if not self._is_open:
            self.admit()
        engine = self.service.need_engine
        self._stream = await engine.open_stream(
            self.prompts, self.params, self._engine_ids, priority=self.priority, tenant=self.tenant
        )
        self._patience = self._limit_queueing(engine)
        await self.end_if_aborted()

    async def end_if_aborted(self) -> None:
        """Whoever aborted the request before the engine had it could not tell the engine."""
        if self.service.open_requests.is_aborted(self.request_id):
            await self.service.need_engine.abort(self._engine_ids)

    @property
    def num_open(self) -> int:
        """Prompts whose last output was not taken yet."""
        return 0 if self._stream is None else self._stream.num_open

    async def next(self) -> list[RequestOutput]:
        """What is new, at most one output per prompt. Cancelling loses nothing.

        Raises:
            OctavoError: A prompt was refused, or the engine has ended.
        """
        outputs = await self._started.get()
        self.note(outputs)
        return outputs

    def attach(self, sink: OutputSink[RequestOutput], *, is_paused: bool) -> None:
        """Let ``sink`` be called instead of waiting in ``next``. It passes all that it gets to ``note``.

        Args:
            sink: Whom to call.
            is_paused: Whether not before ``resume``.
        """
        self._started.attach(sink, is_paused=is_paused)

    def pause(self) -> None:
        """Join outputs instead of giving them to the sink."""
        if self._stream is not None:
            self._stream.pause()

    def resume(self) -> None:
        """Go on after ``pause``."""
        if self._stream is not None:
            self._stream.resume()

    @property
    def _started(self) -> OutputStream[RequestOutput]:
        assert self._stream is not None, "start comes first"
        return self._stream

    def _limit_queueing(self, engine: Engine) -> asyncio.Task[None] | None:
        """Ends the request after ``max_queue_ms`` unless the engine has begun with it."""
        if self.max_queue_ms is None:
            return None

        async def give_up(limit_s: float) -> None:
            await asyncio.sleep(limit_s)
            self._has_waited_too_long = True
            await engine.abort(self._engine_ids, only_if_waiting=True)

        return asyncio.create_task(give_up(self.max_queue_ms / 1000))

    def _check_waited(self, output: RequestOutput) -> None:
        reasons = {answer.finish_reason for answer in output.outputs}
        if self._has_waited_too_long and reasons == {"abort"} and not any(each.token_ids for each in output.outputs):
            raise QueueTimeoutError(
                f"the request waited longer than max_queue_ms ({self.max_queue_ms} ms) for the engine to begin; try "
                "again later, or allow more"
            )

    @property
    def pending_bytes(self) -> int:
        """About how much has come for this request that its reader has not taken."""
        if self._stream is None:
            return 0
        waiting = sum(len(answer.token_ids) for output in self._stream.waiting for answer in output.outputs)
        logprobs = self.params.logprobs
        return waiting * (BYTES_PER_TOKEN + (0 if logprobs is None else BYTES_PER_LOGPROB * (logprobs + 1)))

    def note(self, outputs: Sequence[RequestOutput]) -> bool:
        """Keep account of outputs that are about to be shown.

        Returns:
            Whether nothing more will come.

        Raises:
            QueueTimeoutError: The request has ended because it waited too long.
        """
        if not self._last:
            self._check_waited(outputs[0])
            if self._ticket is not None:
                self._ticket.started()
        for output in outputs:
            self._last[output.request_id] = output
            for answer in output.outputs:
                if answer.finish_reason is not None:
                    self._reasons.append(answer.finish_reason)
        return self._started.num_open == 0

    @property
    def latest(self) -> list[RequestOutput]:
        """The newest output of each prompt of which anything has come."""
        return list(self._last.values())

    def close(self, error: BaseException | None = None) -> None:
        """End what still runs, give back what ``admit`` took, and tell the observers. May be called twice.

        Args:
            error: What ended the request before its time.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._error = self._error or error
        if self._stream is not None:
            self._stream.close()
        if self._patience is not None:
            self._patience.cancel()
        self.service.open_requests.close(self.request_id)
        if self._ticket is not None:
            self._ticket.close()
        num_answers = len(self.prompts) * self.params.n
        lasts = self.latest
        record = RequestRecord(
            request_id=self.request_id,
            route=self.route,
            model=self.model,
            tenant=self.tenant,
            num_prompt_tokens=sum(len(output.prompt_token_ids or ()) for output in lasts),
            num_cached_tokens=sum(output.num_cached_tokens or 0 for output in lasts),
            num_generation_tokens=sum(num_tokens_of(output) for output in lasts),
            finish_reasons=(*self._reasons, *("abort",) * (num_answers - len(self._reasons))),
            params=self.params,
            stats=lasts[-1].metrics if lasts else None,
            received_s=self.received_s,
            finished_s=time.monotonic(),
            error_code=_code_of(self._error),
        )
        for observer in self.service.observers:
            observer.request_finished(record)


def num_tokens_of(output: RequestOutput) -> int:
    """Tokens generated so far for a prompt, all its answers together."""
    return 0 if output.metrics is None else output.metrics.num_generation_tokens


def _code_of(error: BaseException | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "client_gone"
    return error.code if isinstance(error, OctavoError) else "internal_error"


def _num_tokens_guess(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt) // CHARS_PER_TOKEN_GUESS + 1
    if isinstance(prompt, dict):
        ids: Any = prompt.get("prompt_token_ids")
        return len(ids) if ids is not None else _num_tokens_guess(prompt.get("prompt") or "")
    return len(prompt)


def check_generation(
    service: Service, body: dict[str, Any], unsupported: Mapping[str, Unsupported], request_class: type[R]
) -> tuple[R, str]:
    """What all requests for text must hold to: the fields of ``body``, and the model's name to answer under.

    Raises:
        InvalidRequestError: ``param`` names the field.
        MissingModelError, NotReadyError: See ``check_model``.
    """
    refuse_unsupported(body, unsupported)
    if isinstance(body.get("stream_options"), dict):
        refuse_unsupported(body["stream_options"], STREAM_OPTIONS, "stream_options.")
    fields = check_body(request_class, body)
    if service.config.strict_openai:
        _check_strictly(fields)
    model = check_model(service, fields.model)
    check_stream_options(fields)
    return fields, model


def _check_strictly(request: GenerationRequest) -> None:
    """Bounds of OpenAI's that are wider here by default, because clients of vLLM use that."""
    refusal: InvalidRequestError | None = None
    if request.model is None:
        refusal = InvalidRequestError("model is missing, but is required under --strict-openai", param="model")
        refusal.code = "missing_required_parameter"
    elif request.temperature is not None and request.temperature > STRICT_TEMPERATURE:
        refusal = InvalidRequestError(
            f"temperature is {request.temperature:g}, but must be at most {STRICT_TEMPERATURE} under --strict-openai",
            param="temperature",
        )
        refusal.code = "decimal_above_max_value"
    elif isinstance(request.stop, list) and len(request.stop) > STRICT_STOPS:
        refusal = InvalidRequestError(
            f"stop has {len(request.stop)} texts, but must have at most {STRICT_STOPS} under --strict-openai",
            param="stop",
        )
        refusal.code = "array_above_max_length"
    if refusal is not None:
        raise refusal


def check_stream_options(request: GenerationRequest) -> None:
    """What a stream may and may not be asked for.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options is given, but stream is not true", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed: set stream to false", param="prompt_logprobs")


def check_priority(service: Service, priority: int | None) -> int:
    """The priority to run under.

    Raises:
        InvalidRequestError: It would change nothing under the present policy.
    """
    policy = service.need_engine.ready.config.scheduler.policy
    if priority and policy == "fcfs":
        raise InvalidRequestError(
            f"priority is {priority}, but requests run in the order of their arrival: start the server with "
            "--scheduling-policy priority",
            param="priority",
        )
    return priority or 0


def logit_bias_of(given: dict[str, float] | None) -> dict[int, float] | None:
    """JSON's keys as the token ids that they are.

    Raises:
        InvalidRequestError: One is none, or a bias is out of bounds.
    """
    if not given:
        return None
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequestError(
                f"logit_bias has the key {shorten(key, 40)!r}, but keys must be token ids", param="logit_bias"
            )
        if not -100 <= bias <= 100:
            raise InvalidRequestError(
                f"logit_bias of token {key} is {bias:g}, but must be from -100 to 100", param="logit_bias"
            )
        biases[int(key)] = bias
    return biases


def log_request(service: Service, request_id: str, request: GenerationRequest, prompts: Sequence[Prompt]) -> None:
    """A line about a request, where the user wants them. Control characters are escaped by repr."""
    if not service.config.enable_log_requests:
        return
    limit = service.config.max_log_len
    texts: list[str] = []
    for prompt in prompts:
        shown: Any = prompt.get("prompt") or prompt.get("prompt_token_ids") if isinstance(prompt, dict) else prompt
        texts.append(repr(shown if limit is None else shown[:limit]))
    rest = request.model_dump(exclude_none=True, exclude={"prompt", "messages"})
    logger.info("Received request %s: %r, prompts: %s", request_id, rest, "; ".join(texts))

"""Requests and answers of a model that pools: text and PoolingParams to a core request, numbers back to an output.

The counterpart of ``input_processor.py`` and ``output_processor.py`` for engines that generate; a frontend has the one
or the other. Nothing is queued here. Thread-safe where requests are made.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, cast

from octavo.config.model import ModelConfig
from octavo.config.sections import PoolingConfig
from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.frontend.input_processor import MAX_SALT_CHARS, MAX_TENANT_CHARS, check_label
from octavo.frontend.output_processor import ProcessedOutputs
from octavo.frontend.token_ids import as_token_ids, check_token_ids
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineCoreOutput, EngineCoreRequest, Pooled, ResolvedPooling, ResolvedSampling
from octavo.outputs import RequestStateStats
from octavo.pooling_outputs import PoolingOutput, PoolingRequestOutput
from octavo.pooling_params import PoolingParams

CHARS_PER_TOKEN_GUESS = 64
"""A text of more characters per token of the context is cut before it is tokenized to be cut."""


class TextPairPrompt(TypedDict, total=False):
    """Two texts for a classifier that reads both (a cross-encoder)."""

    prompt: str
    second_prompt: str
    cache_salt: str


@dataclass(frozen=True, slots=True)
class ProcessedPooling:
    """One text, checked and resolved."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: PoolingParams
    core_requests: list[EngineCoreRequest]
    """One."""
    arrival_time_s: float


@dataclass(frozen=True, slots=True)
class _Checked:
    text: str | None
    token_ids: list[int]
    second_start: int
    cache_salt: str | None


class PoolingProcessor:
    """Checks and resolves requests for one model.

    Args:
        model: Vocabulary and hidden size.
        pooling: What the model is made for.
        max_model_len: Longest text.
        tokenizer: None under ``skip_tokenizer_init``: texts are ids then.
        client_index: Which frontend this is.
    """

    def __init__(
        self,
        model: ModelConfig,
        pooling: PoolingConfig,
        max_model_len: int,
        tokenizer: Tokenizer | None,
        *,
        client_index: int = 0,
    ) -> None:
        self._model = model
        self._pooling = pooling
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._client_index = client_index

    @property
    def is_cross_encoder(self) -> bool:
        """Whether a score is one number that the model gives for two texts it reads together."""
        return self._pooling.task == "classify" and self._pooling.num_labels == 1

    def process(
        self,
        request_id: str,
        prompt: object,
        params: PoolingParams | None = None,
        *,
        task: str = "encode",
        priority: int = 0,
        tenant: str = "default",
    ) -> ProcessedPooling:
        """Check and resolve one request.

        Args:
            request_id: Unique among the unfinished ones.
            prompt: Text; token ids; or a mapping with ``prompt`` or ``prompt_token_ids``, perhaps ``second_prompt``
                (for a classifier that reads two texts) and ``cache_salt``.
            params: None for defaults.
            task: What the caller's method means, where ``params`` do not say.
            priority: Lower runs first, under the priority policy.
            tenant: Whose request it is.

        Raises:
            InvalidRequestError: ``param`` names the field.
            ContextLengthError: The text does not fit, and cutting it was not asked for.
        """
        check_label("request_id", request_id, 1024)
        check_label("tenant", tenant, MAX_TENANT_CHARS)
        params = PoolingParams() if params is None else params
        if not isinstance(params, PoolingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"pooling_params is a {type(params).__name__}, but must be a PoolingParams", param="pooling_params"
            )
        resolved = self._resolve(params, params.task or task)
        checked = self._check(prompt, self._limit(params))
        resolved = ResolvedPooling(
            per_token=resolved.per_token,
            activation=resolved.activation,
            dimensions=resolved.dimensions,
            second_text_start=checked.second_start,
        )
        arrival = time.time()
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=checked.token_ids,
            # The state of a token that was found in the cache is not there to be counted.
            sampling=ResolvedSampling(
                max_tokens=1,
                seed=0,
                skip_reading_prefix_cache=self._pooling.pooling_type != "LAST" or resolved.per_token,
            ),
            arrival_time_s=arrival,
            tenant=tenant,
            priority=priority,
            cache_salt=checked.cache_salt,
            client_index=self._client_index,
            pooling=resolved,
        )
        return ProcessedPooling(request_id, checked.text, checked.token_ids, params, [request], arrival)

    # -------------------------------------------------------------------------------------------------- parameters

    def _resolve(self, params: PoolingParams, task: str) -> ResolvedPooling:
        config = self._pooling
        made_for = config.task
        wanted = {"encode": made_for, "token_embed": "embed", "score": "classify" if self.is_cross_encoder else "embed"}
        if wanted.get(task, task) != made_for:
            labels = f" ({config.num_labels} labels)" if config.num_labels else ""
            raise InvalidRequestError(
                f"task is {task}, but this model is run for {made_for}{labels}"
                + (": start it with --convert embed" if made_for == "classify" and task != "score" else ""),
                param="task",
            )
        dimensions = params.dimensions or 0
        if dimensions and made_for != "embed":
            raise InvalidRequestError("dimensions can be chosen for embeddings only", param="dimensions")
        if dimensions > self._model.hidden_size:
            raise InvalidRequestError(
                f"dimensions is {dimensions}, but the model's vectors have {self._model.hidden_size}",
                param="dimensions",
            )
        activation = config.activation
        if params.activation is False:
            activation = "none"
        elif params.activation and activation == "none":
            activation = "normalize" if made_for == "embed" else "sigmoid" if config.num_labels == 1 else "softmax"
        return ResolvedPooling(per_token=task == "token_embed", activation=activation, dimensions=dimensions)

    def _limit(self, params: PoolingParams) -> int | None:
        """Tokens to which a text is cut; None for not at all."""
        asked = params.truncate_prompt_tokens
        if asked is None:
            return None
        if asked > self._max_model_len:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {asked}, but this model takes at most {self._max_model_len} tokens",
                param="truncate_prompt_tokens",
            )
        return self._max_model_len if asked == -1 else asked

    # ----------------------------------------------------------------------------------------------------- prompts

    def _check(self, prompt: object, limit: int | None) -> _Checked:
        if isinstance(prompt, str):
            return self._encode(prompt, None, limit, None)
        if not isinstance(prompt, Mapping):
            return _Checked(None, self._check_ids(prompt, "prompt", limit), 0, None)
        fields = cast("Mapping[str, object]", prompt)
        known = ("prompt", "second_prompt", "prompt_token_ids", "cache_salt")
        unknown = [name for name in fields if name not in known and fields[name] is not None]
        if unknown:
            raise InvalidRequestError(
                f"the prompt has an unknown key {unknown[0]!r:.80}; known are {', '.join(known)}", param="prompt"
            )
        salt = fields.get("cache_salt")
        if salt is not None:
            check_label("cache_salt", salt, MAX_SALT_CHARS)
        salt = cast("str | None", salt)
        text, second = fields.get("prompt"), fields.get("second_prompt")
        for name, value in (("prompt", text), ("second_prompt", second)):
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"{name} is a {type(value).__name__}, but must be a string", param=name)
        text, second = cast("str | None", text), cast("str | None", second)
        if fields.get("prompt_token_ids") is not None:
            if second is not None:
                raise InvalidRequestError("second_prompt needs prompt as a text, not as ids", param="second_prompt")
            return _Checked(text, self._check_ids(fields["prompt_token_ids"], "prompt_token_ids", limit), 0, salt)
        if text is None:
            raise InvalidRequestError("the prompt has neither prompt nor prompt_token_ids", param="prompt")
        return self._encode(text, second, limit, salt)

    def _encode(self, text: str, second: str | None, limit: int | None, salt: str | None) -> _Checked:
        if self._tokenizer is None:
            raise InvalidRequestError(
                "a text needs a tokenizer, and --skip-tokenizer-init left it out: send prompt_token_ids", param="prompt"
            )
        given, longest = text, CHARS_PER_TOKEN_GUESS * self._max_model_len
        if limit is not None:
            text, second = text[:longest], None if second is None else second[:longest]
        elif len(text) + len(second or "") > longest:
            self._refuse_length(f"{len(text) + len(second or '')} characters", "prompt")
        if self._pooling.is_lower_case:
            text, second = text.lower(), None if second is None else second.lower()
        ids, second_start = self._tokenizer.encode_pair(text, second, limit)
        if not ids:
            raise InvalidRequestError("the text is empty and has no tokens", param="prompt")
        if len(ids) > self._max_model_len:
            self._refuse_length(f"{len(ids)} tokens", "prompt")
        if max(ids) >= self._model.vocab_size:
            raise InvalidRequestError(
                f"the tokenizer gives the id {max(ids)}, but the model has {self._model.vocab_size} of them",
                param="prompt",
            )
        return _Checked(given if second is None else None, ids, second_start, salt)

    def _check_ids(self, prompt: object, param: str, limit: int | None) -> list[int]:
        ids = as_token_ids(prompt, param)[:limit]
        if len(ids) > self._max_model_len:
            self._refuse_length(f"{len(ids)} tokens", param)
        check_token_ids(ids, self._model.vocab_size, param)
        return ids

    def _refuse_length(self, size: str, param: str) -> None:
        raise ContextLengthError(
            f"the text has {size}, but this model takes at most {self._max_model_len} tokens: shorten it, or cut it "
            "with truncate_prompt_tokens (-1: to that length)",
            param=param,
        )


class PoolingObserver(Protocol):
    """Is told of requests that have what they wanted; ``observability/request_stats.py`` counts them."""

    def pooled(
        self, num_prompt_tokens: int, stats: RequestStateStats, num_cached_tokens: int, now_s: float, /
    ) -> None: ...


class PoolingOutputs:
    """The unfinished requests of one client; has the methods of ``OutputProcessor``.

    Args:
        observer: Counts what happens, if anybody wants to know.
    """

    def __init__(self, observer: PoolingObserver | None = None) -> None:
        self._observer = observer
        self._requests: dict[str, ProcessedPooling] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests that will produce output."""
        return len(self._requests)

    @property
    def unfinished_ids(self) -> list[str]:
        """Their ids, oldest first."""
        return list(self._requests)

    def register(self, processed: ProcessedPooling) -> None:
        """Expect the output of a request; call before its core request is sent.

        Raises:
            InvalidRequestError: An unfinished request has this id.
        """
        if processed.request_id in self._requests:
            raise InvalidRequestError(
                f"request_id {processed.request_id[:80]!r} belongs to a request that is still running",
                param="request_id",
            )
        self._requests[processed.request_id] = processed

    def core_ids(self, request_id: str) -> list[str]:
        """What to abort; empty for a request that is not known (any more)."""
        return [request_id] if request_id in self._requests else []

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """Expect nothing more for these requests.

        Returns:
            Core ids to abort.
        """
        return [each for each in request_ids if self._requests.pop(each, None) is not None]

    def process(self, outputs: Sequence[EngineCoreOutput]) -> ProcessedOutputs[PoolingRequestOutput]:
        """Take in what the core sent. Outputs for requests that are not known (any more) are dropped."""
        made: list[PoolingRequestOutput] = []
        for output in outputs:
            request = self._requests.pop(output.request_id, None)
            if request is None:
                continue
            answer = _output(request, output)
            made.append(answer)
            if self._observer is not None and answer.error is None and answer.metrics is not None:
                self._observer.pooled(
                    len(request.prompt_token_ids), answer.metrics, answer.num_cached_tokens or 0, time.time()
                )
        return ProcessedOutputs(made, [])


def _output(request: ProcessedPooling, output: EngineCoreOutput) -> PoolingRequestOutput:
    stats = RequestStateStats(arrival_time=request.arrival_time_s)
    timings = output.timings
    if timings is not None:
        stats.queued_ts, stats.scheduled_ts = timings.queued_s, timings.scheduled_s
        stats.first_token_ts = stats.last_token_ts = timings.last_token_s
        stats.num_preemptions = timings.num_preemptions
    error = output.error
    if output.pooled is None and error is None:
        error = "the request was aborted"
    return PoolingRequestOutput(
        request_id=request.request_id,
        outputs=_numbers(output.pooled),
        prompt_token_ids=request.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        prompt=request.prompt,
        metrics=stats,
        error=error,
    )


def _numbers(pooled: Pooled | None) -> PoolingOutput:
    numbers = array("f")
    if pooled is None:
        return PoolingOutput(numbers, (0,))
    numbers.frombytes(pooled.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return PoolingOutput(numbers, tuple(pooled.shape))

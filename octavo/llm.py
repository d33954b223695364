"""LLM: prompts in, answers out, blocking. For scripts and notebooks; a server uses ``engine/async_llm.py``.

Names and rules are those that users of vLLM know. All prompts of a call are checked before the first is queued. The
engine runs in this process and works only inside a call; nothing here knows how.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, cast

from octavo.config.args import EngineArgs
from octavo.config.env import apply_environment, read_environment
from octavo.config.flags import engine_args_from_keywords
from octavo.config.setting import settings_of
from octavo.engine.frontend import AnyOutput, Frontend, start_frontend
from octavo.engine.interrupts import DeferredInterrupt
from octavo.engine.offline import (
    AnyProcessed,
    Progress,
    QueueRoom,
    UseTqdm,
    as_list,
    final_only,
    one_each,
    refuse_given,
)
from octavo.engine.pooling_calls import ScorePlan, as_texts
from octavo.errors import EngineDeadError, InvalidRequestError
from octavo.frontend.beam_search import BeamSearches, BeamSearchOutput, BeamSearchParams
from octavo.frontend.chat_template import ChatOptions
from octavo.frontend.input_processor import ProcessedRequest, Prompt, TokensPrompt, eos_token_ids_of
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineReady
from octavo.observability.metrics import Metric
from octavo.outputs import RequestOutput
from octavo.pooling_outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
    as_classification,
    as_embedding,
)
from octavo.pooling_params import PoolingParams
from octavo.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
Message = Mapping[str, Any]


class LLM:
    """A model and its engine.

    Args:
        model: A folder with safetensors, a GGUF file, a Hugging Face name, or an alias; None for the default model.
        in_process: False puts the engine into a process of its own.
        engine_args: Any field of ``EngineArgs`` by name.

    Environment variables of ``config/env.py`` fill in what no keyword says, and the log names those that were read.

    Raises:
        ConfigError: A keyword or its value is impossible; the message says what is possible.
        ModelNotFoundError, CheckpointError: The model cannot be found or read.
    """

    def __init__(self, model: str | None = None, *, in_process: bool = True, **engine_args: Any) -> None:
        args = engine_args_from_keywords({"model": model, **engine_args}, logger.warning)
        environment = read_environment(os.environ)
        for note in environment.notes:
            logger.warning("%s", note)
        self._start(apply_environment(args, environment), in_process)

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, in_process: bool = True) -> LLM:
        """An LLM with exactly these settings."""
        llm = cls.__new__(cls)
        llm._start(args, in_process)
        return llm

    def _start(self, args: EngineArgs, in_process: bool) -> None:
        self._lock = threading.RLock()
        self._enqueued: list[ProcessedRequest] = []
        self._ids = itertools.count()
        self._frontend: Frontend = start_frontend(args, in_process)

    # -------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts.

        Ctrl-C ends all requests of the call after the step at hand; the LLM can be used further.

        Args:
            prompts: One prompt or a list. A prompt is a string, a list of token ids, or a dict with ``prompt`` or
                ``prompt_token_ids``, and optionally ``cache_salt``.
            sampling_params: One for all, one per prompt, or None for the model's defaults.
            use_tqdm: Whether to show progress, or a function that makes the bar.
            lora_request: Not supported yet.
            priority: One per prompt, lower runs first; needs ``scheduling_policy="priority"``.
            tokenization_kwargs: ``add_special_tokens``, ``truncation`` and so on are not supported.
            mm_processor_kwargs: Not supported: there are no multi-modal models yet.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            InvalidRequestError, ContextLengthError: A prompt or a parameter is impossible; nothing has run.
            EngineDeadError: The engine has ended.
        """
        refuse_given("tokenization_kwargs", tokenization_kwargs)
        refuse_given("mm_processor_kwargs", mm_processor_kwargs)
        with self._lock:
            requests = self._check_all(as_list(prompts), sampling_params, priority, lora_request)
            return self._run(requests, use_tqdm)

    def chat(  # noqa: PLR0913 - the signature that users know
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations; as ``generate`` after the model's chat template.

        Args:
            messages: One conversation (a list of messages with ``role`` and ``content``) or a list of them.
            sampling_params: As for ``generate``.
            use_tqdm: As for ``generate``.
            lora_request: Not supported yet.
            chat_template: Name of one of the model's templates, or a template; None for the default.
            chat_template_content_format: ``auto``, ``string`` or ``openai``: how templates get lists of parts.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: Go on with the last message instead of answering it.
            tools: Not supported yet.
            chat_template_kwargs: Further variables for the template.

        Raises:
            InvalidRequestError, ContextLengthError: Nothing has run.
            EngineDeadError: The engine has ended.
        """
        options = ChatOptions(
            # Going on with a message excludes the opening of the next, whose default is True.
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            content_format=chat_template_content_format,
            template_kwargs=dict(chat_template_kwargs or {}),
        )
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        with self._lock:
            render = self._frontend.inputs.render_chat
            prompts: list[Prompt] = [
                render(cast("Sequence[Message]", conversation), options, tools) for conversation in conversations
            ]
            requests = self._check_all(prompts, sampling_params, None, lora_request)
            return self._run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: object = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Search for the likeliest answers; ``frontend/beam_search.py`` says how. Fast with prefix caching only.

        Args:
            prompts: As for ``generate``.
            params: The same for all.
            lora_request: Not supported yet.
            use_tqdm: As for ``generate``.
            concurrency_limit: Most prompts to search for at a time; None for all. What many long ones have in the
                prefix cache may push each other out.

        Returns:
            One output per prompt, in the order of the prompts, with ``beam_width`` sequences at most, the best first.

        Raises:
            InvalidRequestError, ContextLengthError: A prompt or a parameter is impossible; nothing has run.
            EngineDeadError: The engine has ended.
        """
        if not isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"params is a {type(params).__name__}, but must be a BeamSearchParams", param="params"
            )
        config = self.ready.config
        params.check_engine(config.frontend.logprobs_mode, config.frontend.max_logprobs, config.model.vocab_size)
        given = as_list(prompts)
        size = max(1, len(given) if concurrency_limit is None else concurrency_limit)
        found: list[BeamSearchOutput] = []
        eos, limit = eos_token_ids_of(config.model, self._frontend.tokenizer), config.scheduler.max_model_len
        with self._lock, Progress(use_tqdm, len(given)) as progress:
            checked = self._check_all(given, params.step, None, lora_request)
            for start in range(0, len(given), size):
                part = [_tokens_of(each) for each in checked[start : start + size]]
                searches = BeamSearches(part, params, eos, limit)
                while reads := searches.prompts():
                    progress.advance(searches.take(self._run(self._check_all(reads, params.step, None, None), False)))
                found += [BeamSearchOutput(search.best()) for search in searches.searches]
        tokenizer = self._frontend.tokenizer
        for prompt, output in zip(given, found, strict=True):
            for each in output.sequences:
                each.orig_prompt, each.text = prompt, None if tokenizer is None else tokenizer.decode(each.tokens)
        return found

    # ----------------------------------------------------------------------------------------------------- pooling

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str = "encode",
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """What a pooling model makes of texts, as it is.

        Args:
            prompts: As for ``generate``; a dict may have ``second_prompt`` for a classifier that reads two texts.
            pooling_params: One for all, one per prompt, or None for the model's own.
            pooling_task: embed, classify, score, token_embed (a vector per token); encode: what the model is made for.
            use_tqdm: As for ``generate``.
            lora_request: Not supported yet.
            tokenization_kwargs: Not supported; ``PoolingParams.truncate_prompt_tokens`` cuts long texts.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            InvalidRequestError, ContextLengthError: The model generates, or a prompt or a parameter is impossible;
                nothing has run.
            EngineDeadError: The engine has ended.
        """
        refuse_given("lora_request", lora_request)
        refuse_given("tokenization_kwargs", tokenization_kwargs)
        texts = as_texts("prompts", prompts)
        params = one_each("pooling_params", pooling_params, len(texts), PoolingParams)
        with self._lock:
            requests = [
                self._frontend.process_pooling(str(next(self._ids)), prompt, one_params, task=pooling_task)
                for prompt, one_params in zip(texts, params, strict=True)
            ]
            return cast("list[PoolingRequestOutput]", self._run(requests, use_tqdm))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
    ) -> list[EmbeddingRequestOutput]:
        """Texts as vectors; see ``encode``."""
        options: dict[str, Any] = {"pooling_task": "embed", "use_tqdm": use_tqdm, "lora_request": lora_request}
        return [as_embedding(output) for output in self.encode(prompts, pooling_params, **options)]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
    ) -> list[ClassificationRequestOutput]:
        """The classes of texts; see ``encode``."""
        options: dict[str, Any] = {"pooling_task": "classify", "use_tqdm": use_tqdm, "lora_request": lora_request}
        return [as_classification(output) for output in self.encode(prompts, pooling_params, **options)]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: object = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: by a cross-encoder, or as the cosine of their embeddings.

        Args:
            data_1: One text, or as many as ``data_2``.
            data_2: One or several.
            pooling_params: For all.
            use_tqdm: As for ``generate``.
            lora_request: Not supported yet.

        Returns:
            One output per text of ``data_2``, in order.

        Raises:
            InvalidRequestError: See ``encode``; or the numbers of texts do not fit.
        """
        plan = ScorePlan(
            as_texts("data_1", data_1),
            as_texts("data_2", data_2),
            is_cross_encoder=self._frontend.need_pooling.is_cross_encoder,
        )
        options: dict[str, Any] = {"pooling_task": "score", "use_tqdm": use_tqdm, "lora_request": lora_request}
        return plan.scores(self.encode(plan.prompts, pooling_params, **options))

    # ---------------------------------------------------------------------------------------------------- in pieces

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[str]:
        """Check prompts and keep them for ``wait_for_completion``; returns their request ids."""
        with self._lock:
            requests = self._check_all(as_list(prompts), sampling_params, priority, None)
            self._enqueued += requests
            return [request.request_id for request in requests]

    def wait_for_completion(self, *, use_tqdm: UseTqdm = True) -> list[RequestOutput]:
        """Answer what was enqueued, in the order of enqueueing."""
        with self._lock:
            requests, self._enqueued = self._enqueued, []
            return self._run(requests, use_tqdm)

    # -------------------------------------------------------------------------------------------------- questions

    @property
    def ready(self) -> EngineReady:
        """What the engine found when it started: settings, decisions, memory, seconds."""
        return self._frontend.client.ready

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: The engine runs without one.
        """
        return self._frontend.need_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` uses when it is given none: the model's own recommendation."""
        return self._frontend.inputs.default_sampling_params

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of the engine, now."""
        return self._frontend.get_metrics()

    def get_world_size(self) -> int:
        """Number of devices."""
        return self.ready.config.parallel.tensor_parallel_size

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; whether that was possible."""
        with self._lock:
            return self._frontend.client.call("reset_prefix_cache")

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begin to record the engine's work with torch's profiler; needs ``torch_profiler_dir``.

        Raises:
            InvalidRequestError: No folder was set, or a recording runs.
        """
        with self._lock:
            self._frontend.client.call("start_profile", profile_prefix)

    def stop_profile(self) -> str:
        """End the recording; the file that it is in, for chrome://tracing or Perfetto."""
        with self._lock:
            return self._frontend.client.call("stop_profile")

    def close(self) -> None:
        """End the engine and free its memory. May be called twice."""
        self._frontend.client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------- details

    def _check_all(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        lora_request: object,
    ) -> list[ProcessedRequest]:
        params = one_each("sampling_params", sampling_params, len(prompts), SamplingParams)
        priorities = one_each("priority", 0 if priority is None else priority, len(prompts), int)
        if priority is not None and self.ready.config.scheduler.policy == "fcfs" and any(priorities):
            raise InvalidRequestError(
                'priority is given, but the engine serves first come, first served: use scheduling_policy="priority"',
                param="priority",
            )
        return [
            self._frontend.process(
                str(next(self._ids)),
                prompt,
                final_only(one_params or self.get_default_sampling_params()),
                priority=one_priority,
                lora_request=lora_request,
            )
            for prompt, one_params, one_priority in zip(prompts, params, priorities, strict=True)
        ]

    def _run(self, requests: Sequence[AnyProcessed], use_tqdm: UseTqdm) -> list[Any]:
        """The last output of each request, of the kind that belongs to it, in order."""
        finished: dict[str, AnyOutput] = {}
        with Progress(use_tqdm, len(requests)) as progress, DeferredInterrupt() as interrupt:
            try:
                for output in self._work(requests, interrupt):
                    finished[output.request_id] = output
                    progress.note(output)
            except EngineDeadError:
                raise
            except BaseException:  # Ctrl-C, or a refusal: end the rest of this call, keep the engine
                with suppress(EngineDeadError):  # a second Ctrl-C ends the engine; the interrupt is what counts
                    self._frontend.abort([request.request_id for request in requests])
                    self._frontend.client.call("ping")  # the aborts are read before this is answered
                raise
        self._rest()
        return [finished[request.request_id] for request in requests]

    def _rest(self) -> None:
        """Let an engine in this process, which works only while it is waited for, find that it is idle: it publishes
        its numbers and checks its books."""
        while (received := self._frontend.client.recv(0.0)) is not None:
            self._frontend.take(received)

    def _work(self, requests: Sequence[AnyProcessed], interrupt: DeferredInterrupt) -> Iterator[AnyOutput]:
        """Submit requests as the engine's queue has room, and yield each output that finishes."""
        frontend, limits = self._frontend, self.ready.config.scheduler
        # Lower priorities first, so that none waits here behind one that the engine would run later.
        waiting = deque(sorted(requests, key=lambda request: request.core_requests[0].priority))
        room = QueueRoom(limits.max_num_queued_reqs, limits.max_num_queued_tokens)
        while waiting or room.num_requests:
            while waiting and room.fits(waiting[0]):
                request = waiting.popleft()
                room.enter(request)
                frontend.submit(request)
            received = frontend.client.recv(None)
            interrupt.check()
            if received is None:
                continue
            outputs, refusals = frontend.take(received)
            if refusals:
                raise refusals[0].cause
            for output in outputs:
                room.leave(output.request_id)
                yield output


def _tokens_of(checked: ProcessedRequest) -> TokensPrompt:
    """A checked prompt in the form in which it can be given again."""
    salt = checked.core_requests[0].cache_salt
    found: TokensPrompt = {"prompt_token_ids": checked.prompt_token_ids}
    return found if salt is None else {**found, "cache_salt": salt}


def _signature() -> inspect.Signature:
    """What ``help(LLM)`` shows: every field of EngineArgs as a keyword."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = vars(EngineArgs())
    names = [name for name in settings_of(EngineArgs) if name != "model"]
    return inspect.Signature(
        [
            inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
            inspect.Parameter("in_process", keyword, default=True),
            *(inspect.Parameter(name, keyword, default=defaults[name]) for name in names),
        ]
    )


LLM.__signature__ = _signature()  # type: ignore[attr-defined]

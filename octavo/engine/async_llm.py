"""AsyncLLM: many streams over one engine, for asyncio.

A thread of its own moves the engine's outputs (and, for an engine in this process, makes it work); each stream keeps
at most one output that its reader has not taken, so that a slow reader costs no memory and holds nobody up. Never
imports torch nor the engine's loop.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, cast

from octavo.config.args import EngineArgs
from octavo.engine.client import InProcessClient, join_steps
from octavo.engine.frontend import AnyOutput, Frontend, start_frontend
from octavo.engine.output_stream import Mail, Mailroom, Out, OutputStream
from octavo.errors import EngineDeadError, OctavoError
from octavo.frontend.chat_template import ChatOptions
from octavo.frontend.input_processor import ProcessedRequest, Prompt, TokensPrompt
from octavo.frontend.pooling_processor import ProcessedPooling
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineCoreOutputs, EngineReady, RequestTimeline
from octavo.observability.metrics import Metric
from octavo.observability.request_stats import RequestStats
from octavo.outputs import RequestOutput
from octavo.pooling_outputs import PoolingRequestOutput
from octavo.pooling_params import PoolingParams
from octavo.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)
LONG_PROMPT_CHARS = 4096
"""A longer prompt is tokenized in a thread, so that it does not hold up the event loop."""
LONG_PROMPT_IDS = 16_384
"""The same of one that is token ids, each of which is looked at."""
PROMPTS_AT_A_TIME = 16
"""Of a request with many prompts, how many are checked before others get their turn."""
PUMP_SLICE_S = 1.0
BEHIND_S = 0.02
"""How long outputs wait at most for an event loop that has not told its readers of those before, and how long it rests
at most when it has."""


class AsyncLLM:
    """An engine for asyncio. Make it with ``from_engine_args``; end it with ``shutdown`` or ``async with``.

    Args:
        frontend: From ``start_frontend``; owned from here on.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._lock = threading.Lock()  # guards the frontend's books, _streams and _mailrooms
        self._streams: dict[str, OutputStream[Any]] = {}
        self._mailrooms: dict[asyncio.AbstractEventLoop, Mailroom] = {}
        self._death: EngineDeadError | None = None
        self._is_stopping = False
        self._pump_thread = threading.Thread(target=self._pump, name="octavo-pump", daemon=True)
        self._pump_thread.start()
        # A program that ends without shutdown must not end under a thread that computes or polls.
        atexit.register(self.shutdown)

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, in_process: bool = False, log_stats: bool | None = None) -> AsyncLLM:
        """Start an engine and wait until it takes requests.

        Args:
            args: What was asked for.
            in_process: Whether the engine lives in a thread of this process, or in a process of its own.
            log_stats: Whether to log throughput while working; None: only if ``disable_log_stats`` was set to False.

        Raises:
            ConfigError, ModelNotFoundError, CheckpointError, EngineDeadError: It cannot start.
        """
        return cls(start_frontend(args, in_process, log_stats))

    # ------------------------------------------------------------------------------------------------- properties

    @property
    def ready(self) -> EngineReady:
        """What the engine found when it started."""
        return self._frontend.client.ready

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: The engine runs without one.
        """
        return self._frontend.need_tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What a request gets that brings none."""
        return self._frontend.inputs.default_sampling_params

    @property
    def errored(self) -> bool:
        """Whether the engine has ended by itself."""
        return self._death is not None

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._death is None and not self._is_stopping

    # --------------------------------------------------------------------------------------------------- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "default",
        lora_request: object = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate; each item is what ``sampling_params.output_kind`` says, the last one has ``finished``.

        Leaving the loop, closing the generator or cancelling the task aborts the request: its row and its KV blocks
        are free again after the step at hand.

        Args:
            prompt: Text, token ids, or a mapping with either.
            sampling_params: None for the model's defaults.
            request_id: Unique among the unfinished ones; None draws one.
            priority: Lower runs first, under the priority policy.
            tenant: Whose request it is.
            lora_request: Not supported yet.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: The request was refused.
            EngineDeadError: The engine has ended.
        """
        request_id = f"async-{next(self._frontend.next_id)}" if request_id is None else request_id
        stream = await self.open_stream(
            [prompt], sampling_params, [request_id], priority=priority, tenant=tenant, lora_request=lora_request
        )
        try:
            while stream.num_open:
                for output in await stream.get():
                    yield output
        finally:
            stream.close()

    async def open_stream(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | None,
        request_ids: Sequence[str],
        *,
        priority: int = 0,
        tenant: str = "default",
        lora_request: object = None,
    ) -> OutputStream[RequestOutput]:
        """Generate for several prompts with one reader, who may be called instead of woken. ``generate`` stands on it.

        Args:
            prompts: Each as for ``generate``.
            sampling_params: The same for all; None for the model's defaults.
            request_ids: One per prompt, unique among the unfinished ones.
            priority: Lower runs first, under the priority policy.
            tenant: Whose requests they are.
            lora_request: Not supported yet.

        Returns:
            To be closed by its reader; requests that are not finished then are aborted.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: A prompt was refused; none is queued.
            EngineDeadError: The engine has ended.
        """
        options = {"priority": priority, "tenant": tenant, "lora_request": lora_request}
        requests: list[ProcessedRequest] = []
        for request_id, prompt in zip(request_ids, prompts, strict=True):
            requests.append(await self._process(request_id, prompt, sampling_params, options))
            if len(requests) % PROMPTS_AT_A_TIME == 0:
                await asyncio.sleep(0)  # others want the loop, too
        is_delta = requests[0].params.output_kind is RequestOutputKind.DELTA
        stream = OutputStream[RequestOutput](request_ids, self._mailroom(), self._drop, is_delta=is_delta)
        self._submit(requests, stream)
        return stream

    async def encode(
        self,
        prompt: object,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        task: str = "encode",
        priority: int = 0,
        tenant: str = "default",
    ) -> PoolingRequestOutput:
        """The vector or the scores of a text, by a model that pools. Cancelling the task aborts the request.

        Args:
            prompt: Text, token ids, or a mapping; see ``PoolingProcessor.process``.
            pooling_params: None for the model's own.
            request_id: Unique among the unfinished ones; None draws one.
            task: embed, classify, score or token_embed, where ``pooling_params`` do not say; encode: what the model is
                made for.
            priority: Lower runs first, under the priority policy.
            tenant: Whose request it is.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: The request was refused.
            EngineDeadError: The engine has ended.
        """
        request_id = f"async-{next(self._frontend.next_id)}" if request_id is None else request_id
        options = {"task": task, "priority": priority, "tenant": tenant}
        if _num_chars(prompt) > LONG_PROMPT_CHARS:
            process = self._frontend.process_pooling
            request = await asyncio.to_thread(process, request_id, prompt, pooling_params, **options)
        else:
            request = self._frontend.process_pooling(request_id, prompt, pooling_params, **options)
        stream = OutputStream[PoolingRequestOutput]([request_id], self._mailroom(), self._drop)
        self._submit([request], stream)
        try:
            return (await stream.get())[0]
        finally:
            stream.close()

    async def abort(self, request_id: str | list[str], *, only_if_waiting: bool = False) -> None:
        """End requests early; their readers get a last output with ``finish_reason`` ``abort``. Unknown ids are
        ignored.

        Args:
            request_id: One or several.
            only_if_waiting: Leave alone a request of which the engine has run any part.
        """
        request_ids = [request_id] if isinstance(request_id, str) else request_id
        with self._lock:
            groups = [self._frontend.outputs.core_ids(each) for each in request_ids]
        for children in groups:
            self._frontend.client.abort(children, only_if_waiting=only_if_waiting)

    async def abort_everywhere(self, request_ids: Sequence[str], tenant: str | None) -> list[str]:
        """End requests of all frontends of the engine, by the ids that their clients know; see ``abort``.

        Args:
            request_ids: Names; unknown ones are passed over.
            tenant: Whose requests; None for anybody's.

        Returns:
            The names that were known.

        Raises:
            EngineDeadError: The engine has ended.
        """
        return await asyncio.to_thread(self._frontend.client.call, "abort_named", list(request_ids), tenant)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> TokensPrompt:
        """A conversation as a prompt for ``generate``.

        Raises:
            InvalidRequestError: A message cannot be honoured, or the model has no chat template.
            ContextLengthError: It is longer than the context.
        """
        return self._frontend.inputs.render_chat(messages, options)

    def tokenize_prompt(self, text: str, *, add_special_tokens: bool = True, keep: int | None = None) -> TokensPrompt:
        """A text as a prompt for ``generate``; see ``InputProcessor.tokenize``.

        Raises:
            ContextLengthError: It is longer than the context.
        """
        return self._frontend.inputs.tokenize(text, add_special_tokens=add_special_tokens, keep=keep)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; whether that was possible (it is not while requests run)."""
        return await asyncio.to_thread(self._frontend.client.call, "reset_prefix_cache")

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begin to record the engine's work; see ``LLM.start_profile``."""
        await asyncio.to_thread(self._frontend.client.call, "start_profile", profile_prefix)

    async def stop_profile(self) -> str:
        """End the recording; the file that it is in."""
        return await asyncio.to_thread(self._frontend.client.call, "stop_profile")

    async def get_metrics(self) -> list[Metric]:
        """All counters and gauges of the engine, now."""
        return await asyncio.to_thread(self._frontend.get_metrics)

    def latest_metrics(self, stats: RequestStats | None = None) -> list[Metric]:
        """All metrics as of the engine's last message; answers at once, whatever the engine does.

        Args:
            stats: What to show of requests; None for those of this process.
        """
        return self._frontend.latest_metrics(self._frontend.stats if stats is None else stats)

    @property
    def request_stats(self) -> RequestStats | None:
        """Where the requests of this process are counted; None where they are not."""
        return self._frontend.stats

    async def timeline(self, request_id: str) -> list[RequestTimeline]:
        """What became of a request, one entry per sequence; empty if it is not known (any more).

        Raises:
            EngineDeadError: The engine has ended.
        """
        return await asyncio.to_thread(self._frontend.timeline, request_id)

    async def check_health(self) -> None:
        """Wait for the engine's loop to answer.

        Raises:
            EngineDeadError: It has ended, or does not answer.
        """
        await asyncio.to_thread(self._frontend.client.call, "ping")

    async def _process(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None, options: dict[str, Any]
    ) -> ProcessedRequest:
        text: object = prompt
        ids: object = prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        is_long = isinstance(text, str) and len(text) > LONG_PROMPT_CHARS
        if is_long or (isinstance(ids, list) and len(cast("list[int]", ids)) > LONG_PROMPT_IDS):
            return await asyncio.to_thread(self._frontend.process, request_id, prompt, params, **options)
        return self._frontend.process(request_id, prompt, params, **options)

    def _all_mailrooms(self) -> list[Mailroom]:
        with self._lock:
            return list(self._mailrooms.values())

    def _mailroom(self) -> Mailroom:
        """Of the event loop that runs."""
        loop = asyncio.get_running_loop()
        with self._lock:
            found = self._mailrooms.get(loop)
            if found is None:
                self._mailrooms = {each: room for each, room in self._mailrooms.items() if not each.is_closed()}
                found = self._mailrooms[loop] = Mailroom(loop)
        return found

    def _submit(self, requests: Sequence[ProcessedRequest | ProcessedPooling], stream: OutputStream[Out]) -> None:
        with self._lock:
            self._check_alive()
            for index, request in enumerate(requests):
                try:
                    self._frontend.submit(request)
                except OctavoError:
                    self._forget(stream.request_ids[:index])
                    raise
                self._streams[request.request_id] = stream

    def _drop(self, stream: OutputStream[Any]) -> None:
        """The reader has gone before the end."""
        with self._lock:
            # Those that finished or failed meanwhile are not its own any more; their ids may even be in use again.
            self._forget([each for each in stream.request_ids if self._streams.get(each) is stream])

    def _forget(self, request_ids: Sequence[str]) -> None:
        """End requests whose reader wants nothing more. The lock is held."""
        for request_id in request_ids:
            del self._streams[request_id]
        if request_ids and self.is_running:
            self._frontend.abort(list(request_ids))

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death.message) from self._death
        if self._is_stopping:
            raise EngineDeadError("the engine was shut down")

    # --------------------------------------------------------------------------------------------------- the pump

    def _pump(self) -> None:
        """Body of the thread: outputs to streams, until the end."""
        begun_s = 0.0
        try:
            while not self._is_stopping:
                received = self._frontend.client.recv(PUMP_SLICE_S)
                if received is None:
                    self._frontend.rest()
                    continue
                if self._give_way(begun_s):
                    received = join_steps([received, *self._more()])
                begun_s = time.monotonic()
                with self._lock:
                    outputs, refusals = self._frontend.take(received)
                    self._deliver(outputs)
                    self._fail_some({refusal.request_id: refusal.cause for refusal in refusals})
        except Exception as error:  # border of the thread: every reader must hear of it
            if not isinstance(error, OctavoError):
                logger.exception("the output thread failed")
            self._fail(error)

    def _give_way(self, begun_s: float) -> bool:
        """Let the event loops finish with the outputs before these, and then rest for half as long as that took.

        A process that is behind would work all the time and write nearly every token of every stream by itself. So it
        works two thirds of the time at most, and what comes meanwhile is shown together, which costs a fraction for
        each token. One that is not behind waits for nothing.

        Args:
            begun_s: When work on those before was begun.

        Returns:
            Whether there was anything to wait for.
        """
        rooms = self._all_mailrooms()
        for room in rooms:
            room.wait_until_told(BEHIND_S)
        told_s = max((room.told_s for room in rooms), default=0.0)
        rest_s = told_s + min((told_s - begun_s) / 2, BEHIND_S) - time.monotonic()
        if rest_s <= 0 or isinstance(self._frontend.client, InProcessClient):  # where nothing comes meanwhile
            return False
        time.sleep(rest_s)
        return True

    def _more(self) -> list[EngineCoreOutputs]:
        """What else has come by now."""
        try:
            received = self._frontend.client.recv(0.0)
        except EngineDeadError:
            return []  # it will be said again
        return [] if received is None else [received]

    def _deliver(self, outputs: Sequence[AnyOutput]) -> None:
        """Hand each output to its stream. The lock is held."""
        streams = self._streams
        mail: dict[Mailroom, list[Mail]] = {}
        for output in outputs:
            stream = streams.get(output.request_id)
            if stream is not None:
                mail.setdefault(stream.mailroom, []).append((stream, output))
                if output.finished:
                    del streams[output.request_id]
        self._post(mail)

    def _fail_some(self, causes: Mapping[str, BaseException]) -> None:
        """Tell the readers of some requests why nothing more will come. The lock is held."""
        mail: dict[Mailroom, list[Mail]] = {}
        for request_id, cause in causes.items():
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                mail.setdefault(stream.mailroom, []).append((stream, cause))
        self._post(mail)

    def _post(self, mail: Mapping[Mailroom, list[Mail]]) -> None:
        """With one wake-up per event loop."""
        for room, letters in mail.items():
            try:
                room.post(letters)
            except RuntimeError:  # the loop was closed with requests running: nobody is left to read
                gone = [request_id for request_id, stream in self._streams.items() if stream.mailroom is room]
                with suppress(EngineDeadError):
                    self._forget(gone)

    def _fail(self, cause: Exception) -> None:
        with self._lock:
            if self._is_stopping:
                return  # told by shutdown
            if isinstance(cause, EngineDeadError):
                self._death = cause
            else:
                self._death = EngineDeadError(f"the engine's output thread failed: {cause!r}")
                self._death.__cause__ = cause
            self._fail_some({each: EngineDeadError(self._death.message) for each in self._streams})

    # -------------------------------------------------------------------------------------------------------- end

    def shutdown(self) -> None:
        """End the engine; readers still waiting get an EngineDeadError. May be called twice, from any thread."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_stopping = True
            error = EngineDeadError("the engine was shut down")
            self._fail_some(dict.fromkeys(self._streams, error))
        atexit.unregister(self.shutdown)
        self._frontend.client.close()
        self._pump_thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)


def _num_chars(prompt: object) -> int:
    """Of the texts of a prompt."""
    texts = cast("Mapping[str, object]", prompt).values() if isinstance(prompt, Mapping) else (prompt,)
    return sum(len(text) for text in texts if isinstance(text, str))

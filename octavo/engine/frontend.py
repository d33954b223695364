"""An engine together with what turns text into requests and outputs into text: what LLM and AsyncLLM stand on.

Starts the engine, loads the tokenizer while the weights are loading, and translates a refusal of the engine back into
the exception that it was. Knows neither threads nor event loops. Never imports torch.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo import errors
from octavo.config.args import EngineArgs
from octavo.config.env import read_environment
from octavo.config.sections import FrontendConfig
from octavo.engine.client import EngineClient, InProcessClient
from octavo.engine.launch import BUILD, OnStarting, launch_engine
from octavo.errors import EngineDeadError, InvalidRequestError, OctavoError
from octavo.frontend.input_processor import InputProcessor, ProcessedRequest, Prompt
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.pooling_processor import PoolingOutputs, PoolingProcessor, ProcessedPooling
from octavo.frontend.tokenizer import Tokenizer, load_tokenizer
from octavo.messages import EngineCoreOutput, EngineCoreOutputs, EngineSnapshot, EngineStarting, RequestTimeline
from octavo.observability.metrics import Metric, metrics_of, request_metrics
from octavo.observability.request_stats import RequestStats
from octavo.observability.stats import LOG_INTERVAL_S, ThroughputMeter
from octavo.outputs import RequestOutput
from octavo.pooling_outputs import PoolingRequestOutput
from octavo.pooling_params import PoolingParams
from octavo.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


AnyOutput = RequestOutput | PoolingRequestOutput
"""What callers get: the one from engines that generate, the other from those that pool."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The engine did not take a request."""

    request_id: str
    cause: OctavoError


class Frontend:
    """One frontend of one engine.

    Args:
        client: The running engine.
        tokenizer: None under ``skip_tokenizer_init``.
        log_stats: Whether to log throughput while the engine works.
        log_interval_s: Seconds between two such lines.
        client_index: Which frontend of the engine this is.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        log_stats: bool = False,
        log_interval_s: float = LOG_INTERVAL_S,
        client_index: int = 0,
    ) -> None:
        config = client.ready.config
        self.client = client
        self.tokenizer = tokenizer
        self.inputs = InputProcessor(
            config.model, config.frontend, config.scheduler.max_model_len, tokenizer, client_index=client_index
        )
        # An engine in this process shares its thread with us: there nothing is counted that nobody asked for.
        self.stats = RequestStats() if log_stats or not isinstance(client, InProcessClient) else None
        pooling = config.pooling
        self.pooling = (
            None
            if pooling is None
            else PoolingProcessor(
                config.model, pooling, config.scheduler.max_model_len, tokenizer, client_index=client_index
            )
        )
        """Makes requests of a model that pools; None for one that generates."""
        self.outputs: OutputProcessor | PoolingOutputs = (
            OutputProcessor(tokenizer, self.stats, config.frontend.stream_interval)
            if pooling is None
            else PoolingOutputs(self.stats)
        )
        self.next_id = itertools.count()
        num_blocks = client.ready.num_blocks
        self._snapshot = EngineSnapshot(time.monotonic(), num_blocks=num_blocks, num_free_blocks=num_blocks - 1)
        label = "" if config.device.device_type == "cpu" else "GPU"
        self._meter = ThroughputMeter(device_label=label, interval_s=log_interval_s) if log_stats else None

    @property
    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequestError: The engine runs without one.
        """
        if self.tokenizer is None:
            raise InvalidRequestError("there is no tokenizer: the engine was started with skip_tokenizer_init")
        return self.tokenizer

    def process(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None, **options: Any
    ) -> ProcessedRequest:
        """Check one prompt; see ``InputProcessor.process``. Queues nothing.

        Raises:
            InvalidRequestError: Also when the model pools.
        """
        if self.pooling is not None:
            raise InvalidRequestError(
                "this model makes embeddings or scores and no text (runner pooling): use embed, classify, score or "
                "encode"
            )
        return self.inputs.process(request_id, prompt, params, **options)

    def process_pooling(
        self, request_id: str, prompt: object, params: PoolingParams | None, **options: Any
    ) -> ProcessedPooling:
        """Check one text; see ``PoolingProcessor.process``. Queues nothing.

        Raises:
            InvalidRequestError: Also when the model generates.
        """
        return self.need_pooling.process(request_id, prompt, params, **options)

    @property
    def need_pooling(self) -> PoolingProcessor:
        """What makes requests of a model that pools.

        Raises:
            InvalidRequestError: The model generates.
        """
        if self.pooling is None:
            raise InvalidRequestError(
                "this engine generates text (runner generate); for embeddings start it with --runner pooling"
            )
        return self.pooling

    def submit(self, request: ProcessedRequest | ProcessedPooling) -> None:
        """Queue a checked prompt.

        Raises:
            InvalidRequestError: Another unfinished request has this id.
            EngineDeadError: The engine has ended.
            QuarantinedError: The engine ended twice over this very request.
        """
        self.outputs.register(request)  # pyright: ignore[reportArgumentType] - made by this frontend for its kind
        try:
            self.client.submit(request.core_requests)
        except OctavoError:
            self.outputs.forget([request.request_id])
            raise

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests here and end them in the engine; unknown ids are ignored. No output follows."""
        self.client.abort(self.outputs.forget(request_ids))

    def take(self, received: EngineCoreOutputs) -> tuple[Sequence[AnyOutput], list[Refusal]]:
        """What one message of the engine means for the callers. Requests that a stop string ended are aborted."""
        if received.snapshot is not None:
            self._snapshot = received.snapshot
            self._log(None if self._meter is None else self._meter.record(received.snapshot))
        refused = {output.request_id: output for output in received.outputs if output.error_code is not None}
        refusals = self._refusals(refused) if refused else []  # which are forgotten, so that what else came is dropped
        processed = self.outputs.process(received.outputs)
        if processed.abort_ids:
            self.client.abort(processed.abort_ids)
        return processed.request_outputs, refusals

    def _refusals(self, refused: dict[str, EngineCoreOutput]) -> list[Refusal]:
        """The callers' requests behind those that the engine refused; their other answers, when n > 1, end too."""
        refusals: list[Refusal] = []
        for request_id in self.outputs.unfinished_ids:
            reasons = [refused[core_id] for core_id in self.outputs.core_ids(request_id) if core_id in refused]
            if reasons:
                refusals.append(Refusal(request_id, refusal_error(reasons[0].error_code or "", reasons[0].error or "")))
        self.abort([refusal.request_id for refusal in refusals])
        return refusals

    def rest(self) -> None:
        """Nothing has come for a while: what was done before may still want its line in the log."""
        self._log(None if self._meter is None else self._meter.tick(time.monotonic()))

    def _log(self, line: str | None) -> None:
        if line is not None:
            logger.info("%s", line)

    def get_metrics(self) -> list[Metric]:
        """All metrics of the engine, now; with those of requests where they are counted."""
        self._snapshot = self.client.call("snapshot")
        return self.latest_metrics(self.stats)

    def latest_metrics(self, stats: RequestStats | None) -> list[Metric]:
        """The same as of the engine's last message, at most a quarter of a second old while it works: asks nobody.

        Args:
            stats: What to show of requests: ours, or the sum over several frontends.
        """
        config = self.client.ready.config
        name = config.frontend.served_model_names[0]
        metrics = metrics_of(self._snapshot, config.cache, name)
        return metrics if stats is None else metrics + request_metrics(stats, name)

    def timeline(self, request_id: str) -> list[RequestTimeline]:
        """What became of a request, one entry per sequence; empty if it is not known (any more).

        Raises:
            EngineDeadError: The engine has ended.
        """
        return msgspec.convert(self.client.call("timeline", request_id), list[RequestTimeline])


def start_frontend(args: EngineArgs, in_process: bool, log_stats: bool | None = None, build: str = BUILD) -> Frontend:
    """Start an engine and the frontend to it. The tokenizer is built in a thread while the engine loads.

    Args:
        args: What the user asked for.
        in_process: Whether the engine lives in this process or in a child.
        log_stats: None: only where ``args.disable_log_stats`` was set to False.
        build: See ``launch_engine``.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError, EngineDeadError: See ``launch_engine``.
    """
    is_logging = args.disable_log_stats is False if log_stats is None else log_stats
    return assemble(lambda on_starting: launch_engine(args, in_process, on_starting, build), is_logging)


def assemble(connect: Callable[[OnStarting], EngineClient], is_logging: bool, client_index: int = 0) -> Frontend:
    """A frontend around a client, with the tokenizer built in a thread while the engine loads.

    Args:
        connect: Starts the engine, or finds it, and waits until it takes requests.
        is_logging: Whether to log throughput while the engine works.
        client_index: Which frontend of the engine this is.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError, EngineDeadError: As ``connect`` does; a tokenizer's fault too.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="octavo-tokenizer")
    loading: list[Future[Tokenizer | None]] = []

    def on_starting(message: EngineStarting) -> None:
        loading.append(pool.submit(_load_tokenizer, message.config.frontend))

    try:
        client = connect(on_starting)
        try:
            tokenizer = loading[0].result() if loading else _load_tokenizer(client.ready.config.frontend)
            interval_s = read_environment(os.environ).log_stats_interval_s
            return Frontend(client, tokenizer, is_logging, interval_s, client_index)
        except BaseException:
            client.close()
            raise
    finally:
        pool.shutdown(wait=False)


def _load_tokenizer(config: FrontendConfig) -> Tokenizer | None:
    return None if config.skip_tokenizer_init else load_tokenizer(config.tokenizer, config.chat_template)


def refusal_error(code: str, message: str) -> OctavoError:
    """The exception that the engine raised, by its stable code."""
    classes: list[Callable[[str], OctavoError]] = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, OctavoError) and each.code == code
    ]
    return classes[0](message) if classes and code != EngineDeadError.code else OctavoError(message)

"""Service: everything that the routes of one HTTP process use, and nothing else.

Made once by ``cli/serve.py`` and given to ``app.build_app``; routes read it, none of them writes it. HTTP is up before
the engine is, so ``engine`` may still be missing: routes ask for it through ``need_engine``. The parts are Protocols:
a test gives an engine of its own, and ``AsyncLLM`` and its supervisor both fit.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from octavo.config.server import ServerConfig
from octavo.engine.output_stream import OutputStream
from octavo.engine.supervisor import EngineEvents
from octavo.errors import OctavoError
from octavo.frontend.chat_template import ChatOptions
from octavo.frontend.input_processor import Prompt, TokensPrompt
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineReady, RequestTimeline
from octavo.observability.metrics import Metric
from octavo.observability.request_stats import RequestStats
from octavo.outputs import RequestOutput, RequestStateStats
from octavo.pooling_outputs import PoolingRequestOutput
from octavo.pooling_params import PoolingParams
from octavo.sampling_params import SamplingParams
from octavo.server.open_requests import OpenRequests
from octavo.server.sse import StallGuard

T = TypeVar("T")
ASGIApp = Callable[..., Any]
"""``async def app(scope, receive, send)``."""
Layer = Callable[[ASGIApp], ASGIApp]
"""Wraps an application in another: what stands in front of the routes."""


class NotReadyError(OctavoError):
    """The server is up and cannot take the request yet, or no longer: loading, or draining."""

    status = 503
    code = "not_ready"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Engine(Protocol):
    """What routes ask of an engine: ``AsyncLLM`` or what stands in front of it."""

    @property
    def ready(self) -> EngineReady: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def default_sampling_params(self) -> SamplingParams: ...
    @property
    def errored(self) -> bool: ...
    @property
    def is_running(self) -> bool: ...
    async def open_stream(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | None,
        request_ids: Sequence[str],
        *,
        priority: int = 0,
        tenant: str = "default",
    ) -> OutputStream[RequestOutput]: ...
    async def encode(
        self,
        prompt: object,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        task: str = "encode",
        priority: int = 0,
        tenant: str = "default",
    ) -> PoolingRequestOutput: ...
    async def abort(self, request_id: str | list[str], *, only_if_waiting: bool = False) -> None: ...
    async def abort_everywhere(self, request_ids: Sequence[str], tenant: str | None) -> list[str]: ...
    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> TokensPrompt: ...
    def tokenize_prompt(
        self, text: str, *, add_special_tokens: bool = True, keep: int | None = None
    ) -> TokensPrompt: ...
    async def reset_prefix_cache(self) -> bool: ...
    async def start_profile(self, profile_prefix: str | None = None) -> None: ...
    async def stop_profile(self) -> str: ...
    async def get_metrics(self) -> list[Metric]: ...
    def latest_metrics(self, stats: RequestStats | None = None) -> list[Metric]: ...
    @property
    def request_stats(self) -> RequestStats | None: ...
    async def timeline(self, request_id: str) -> list[RequestTimeline]: ...
    async def check_health(self) -> None: ...


class Ticket(Protocol):
    """Room that one HTTP request holds while its prompts wait."""

    def started(self) -> None:
        """The first output has come: nothing waits any more."""
        ...

    def close(self) -> None:
        """The request is over, however it ended. May be called twice."""
        ...


class Admission(Protocol):
    """Decides at once whether there is room for a request."""

    @property
    def num_requests(self) -> int:
        """Open HTTP requests that make the engine work."""
        ...

    def reserve(self, *, num_sequences: int, num_prompt_tokens: int, tenant: str) -> Ticket:
        """Take room.

        Args:
            num_sequences: Prompts times ``n``.
            num_prompt_tokens: Of all prompts together.
            tenant: Whose request it is.

        Raises:
            QueueFullError, NotReadyError: There is none; the error says when to come back.
        """
        ...


class Lifecycle(Protocol):
    """Which part of its life the server is in."""

    @property
    def phase(self) -> str:
        """``loading``, ``ready``, ``restarting``, ``stalled``, ``draining`` or ``failed``."""
        ...

    def unhealthy(self) -> OctavoError | None:
        """Why the engine does not work as it should; None if it does."""
        ...

    def unready(self) -> OctavoError | None:
        """Why no traffic should come here now; None if it should."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One finished generation request, for whoever counts."""

    request_id: str
    route: str
    model: str
    tenant: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    finish_reasons: tuple[str, ...]
    """One per answer; ``abort`` for those that the client did not wait for."""
    params: SamplingParams
    stats: RequestStateStats | None
    """None when nothing came back."""
    received_s: float
    """``time.monotonic()`` when the route began with it."""
    finished_s: float
    error_code: str | None = None


class Observer(Protocol):
    """Is told of every request that was handed to the engine, once it is over."""

    def request_finished(self, record: RequestRecord) -> None: ...


@dataclass(slots=True)
class Loading:
    """How far the start has come; shown by health routes and in errors until there is an engine."""

    started_s: float = field(default_factory=time.monotonic)
    phase: str = "starting the engine process"

    def message(self) -> str:
        """In words."""
        return f"the model is still loading: {self.phase} ({time.monotonic() - self.started_s:.0f} s so far)"


@dataclass(slots=True, kw_only=True)
class Service:
    """What the routes use."""

    config: ServerConfig
    engine: Engine | None = None
    """None until it is loaded."""
    engine_events: EngineEvents | None = None
    """How often it was started anew; None where nobody does that."""
    loading: Loading = field(default_factory=Loading)
    lifecycle: Lifecycle | None = None
    admission: Admission | None = None
    metrics: Any = None
    """The registry behind ``/metrics`` (``server/metrics.py``)."""
    observers: list[Observer] = field(default_factory=list[Observer])
    layers: list[Layer] = field(default_factory=list[Layer])
    """In front of the routes, outermost first: limits, then keys."""
    open_requests: OpenRequests = field(default_factory=OpenRequests)
    stall_guard: StallGuard = field(init=False)
    texts: ThreadPoolExecutor = field(init=False)
    """Where conversations are rendered and long texts tokenized, so that streams go on meanwhile."""

    def __post_init__(self) -> None:
        self.stall_guard = StallGuard(self.config.stream_stall_timeout)
        self.texts = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="octavo-text")

    def close(self) -> None:
        """End the threads."""
        self.texts.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function`` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.texts, functools.partial(function, *args))

    @property
    def need_engine(self) -> Engine:
        """The engine.

        Raises:
            NotReadyError: It is not loaded yet.
        """
        if self.engine is None:
            raise NotReadyError(self.loading.message())
        return self.engine

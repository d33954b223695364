"""An OpenTelemetry span per request, sent to a collector in the background. Needs the extra ``otel``; opt-in.

A span begins when the route has the request and ends with its answer; queueing, scheduling and the first token are its
events. It hangs below the client's own span if the request brings a ``traceparent`` header (W3C Trace Context). Names
follow OpenTelemetry's conventions for generative AI, and vLLM's where those have none. Holds nothing of what was asked
or answered. ``instruments.py`` imports this module only when spans are wanted.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from octavo.server.service import ASGIApp, RequestRecord

SPAN_NAME = "llm_request"
_HEADERS = (b"traceparent", b"tracestate")


class RequestTracer:
    """Makes the spans; the service's observer, and a layer that reads the clients' headers.

    Args:
        endpoint: URL of a collector that takes OTLP over HTTP.
        processor: Something else to give finished spans to, for tests.
    """

    def __init__(self, endpoint: str, processor: SpanProcessor | None = None) -> None:
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over this default.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "octavo"}), shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("octavo")
        self._propagator = TraceContextTextMapPropagator()

    def layer(self, app: ASGIApp) -> ASGIApp:
        """Let the spans of a request hang below its client's."""

        async def traced(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            found = {
                name.decode("ascii"): value.decode("latin-1")
                for name, value in scope.get("headers", ())
                if name in _HEADERS
            }
            if not found:
                await app(scope, receive, send)
                return
            token = context.attach(self._propagator.extract(found))
            try:
                await app(scope, receive, send)
            finally:
                context.detach(token)

        return traced

    def request_finished(self, record: RequestRecord) -> None:
        """A request is over. Called in its own task, whose context holds the client's span."""
        offset_s = time.time() - time.monotonic()

        def ns(monotonic_s: float) -> int:
            return int((monotonic_s + offset_s) * 1e9)

        span = self._tracer.start_span(
            SPAN_NAME, kind=SpanKind.SERVER, start_time=ns(record.received_s), attributes=_attributes(record)
        )
        stats = record.stats
        if stats is not None:
            moments = {"queued": stats.queued_ts, "scheduled": stats.scheduled_ts, "first_token": stats.first_token_ts}
            for name, at in moments.items():
                if at:
                    span.add_event(name, timestamp=ns(at))
        if record.error_code is not None:
            span.set_attribute("error.type", record.error_code)
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end(end_time=ns(record.finished_s))

    def close(self) -> None:
        """Send what is left, and end the background thread."""
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    params, stats = record.params, record.stats
    values: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if "chat" in record.route else "text_completion",
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.finish_reasons": list(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generation_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "http.route": record.route,
        "gen_ai.latency.e2e": record.finished_s - record.received_s,
    }
    if stats is not None:
        if stats.first_token_ts:
            values["gen_ai.latency.time_to_first_token"] = stats.first_token_ts - record.received_s
        if stats.scheduled_ts and stats.queued_ts:
            values["gen_ai.latency.time_in_queue"] = stats.scheduled_ts - stats.queued_ts
        if stats.num_preemptions:
            values["octavo.num_preemptions"] = stats.num_preemptions
    return {name: value for name, value in values.items() if value is not None}

"""What makes a server visible, put into its ``Service``: metrics always, spans where they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from octavo.errors import ConfigError
from octavo.server.metrics import ServerMetrics
from octavo.server.service import Service


def install(service: Service, *, share_folder: str | None = None, index: int = 0) -> Callable[[], None]:
    """Give the service its metrics, observers and layers. Once per process, before ``build_app``.

    Args:
        service: Changed in place. Its engine may come later.
        share_folder: Where the HTTP processes of one server leave their numbers for each other; None for a single one.
        index: Of this process among them.

    Returns:
        To be called when the server ends: sends what is left.

    Raises:
        ConfigError: Spans are wanted and OpenTelemetry is not installed.
    """
    endpoint = service.config.otlp_traces_endpoint
    closers: list[Callable[[], None]] = []
    if endpoint is not None:
        tracer = _make_tracer(endpoint)
        service.observers.append(tracer)
        service.layers.insert(0, tracer.layer)
        closers.append(tracer.close)
    metrics = ServerMetrics(service, share_folder=share_folder, index=index)
    service.metrics = metrics
    service.layers.insert(0, metrics.layer)
    closers.append(metrics.close)

    def close() -> None:
        for each in closers:
            each()

    return close


def _make_tracer(endpoint: str):  # noqa: ANN202 - of a module that is imported only if it can be
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"otlp_traces_endpoint is {endpoint!r}, but must be the http(s) URL of an OTLP collector, such as "
            "http://localhost:4318/v1/traces",
            param="otlp_traces_endpoint",
        )
    try:
        module = importlib.import_module("octavo.server.tracing")
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint is set, but OpenTelemetry is not installed ({error.name}): "
            "pip install 'octavo[otel]'",
            param="otlp_traces_endpoint",
        ) from error
    return module.RequestTracer(endpoint)

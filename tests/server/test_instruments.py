"""/metrics, timelines and spans of a server, over an application with an engine of a few lines."""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from octavo.config.server import ServerConfig
from octavo.engine.supervisor import EngineEvents
from octavo.errors import ConfigError
from octavo.messages import EngineSnapshot, RequestTimeline, RequestTimings
from octavo.observability.metrics import Metric, metrics_of, request_metrics
from octavo.observability.request_stats import RequestStats
from octavo.outputs import RequestStateStats
from octavo.sampling_params import SamplingParams
from octavo.server import app as server_app
from octavo.server.admission import Admission
from octavo.server.instruments import install
from octavo.server.service import RequestRecord, Service
from octavo.server.tracing import RequestTracer
from tests.unit.engine.fakes import CONFIG, READY


class Engine:
    """Counts nothing by itself."""

    def __init__(self) -> None:
        self.request_stats = RequestStats()
        self.ready = READY
        self.timelines: list[RequestTimeline] = []

    def latest_metrics(self, stats: RequestStats | None = None) -> list[Metric]:
        snapshot = EngineSnapshot(0.0, num_blocks=8, num_free_blocks=7, generation_tokens=5)
        return metrics_of(snapshot, CONFIG.cache, "fake") + request_metrics(stats or self.request_stats, "fake")

    async def timeline(self, request_id: str) -> list[RequestTimeline]:
        return [each for each in self.timelines if each.request_id == request_id]


def make_service(**config: Any) -> tuple[Service, Any]:
    service = Service(config=ServerConfig(**config))
    engine: Any = Engine()
    service.engine = engine
    return service, engine


def ask(app: Any, *paths: str, method: str = "GET", headers: dict[str, str] | None = None) -> list[httpx.Response]:
    async def work() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(method, path, headers=headers) for path in paths]

    return asyncio.run(work())


def samples_of(response: httpx.Response) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_the_page_has_engine_requests_and_http() -> None:
    service, engine = make_service(mirror_vllm_metrics=True)
    close = install(service)
    engine.request_stats.first_token(0.5)
    app = server_app.build_app(service)
    *_, page = ask(app, "/v1/models", "/v1/models/fake", "/v1/models/other", "/nowhere", "/metrics")
    found = samples_of(page)
    assert found["octavo:generation_tokens_total"][0].value == found["vllm:generation_tokens_total"][0].value == 5
    assert found["octavo:time_to_first_token_seconds_count"][0].value == 1
    http = {(each.labels["route"], each.labels["status"]): each.value for each in found["octavo:http_requests_total"]}
    assert http == {
        ("/v1/models", "200"): 1, ("/v1/models/{model:path}", "200"): 1, ("/v1/models/{model:path}", "404"): 1,
        ("(none)", "404"): 1,
    }  # fmt: skip
    close()


def test_the_page_is_there_while_the_engine_is_not() -> None:
    service = Service(config=ServerConfig())
    install(service)
    models, page = ask(server_app.build_app(service), "/v1/models", "/metrics")
    assert models.status_code == 503 and page.status_code == 200
    found = samples_of(page)
    assert found["octavo:http_requests_total"][0].labels["status"] == "503"
    assert "octavo:num_requests_running" not in found and "process_resident_memory_bytes" in found


def test_whoever_is_scraped_answers_for_all(tmp_path: Path) -> None:
    closers, apps = [], []
    for index in range(2):
        service, engine = make_service()
        closers.append(install(service, share_folder=str(tmp_path), index=index))
        for _ in range(index + 1):
            engine.request_stats.first_token(0.5)
        apps.append(server_app.build_app(service))
        service.metrics._share.publish()
    for app in apps:
        (page,) = ask(app, "/metrics")
        found = samples_of(page)
        assert found["octavo:time_to_first_token_seconds_count"][0].value == 3
        assert found["octavo:generation_tokens_total"][0].value == 5, "the engine's own numbers are not added up"
    for close in closers:
        close()


def test_load_is_that_of_all_processes_and_not_of_the_dead(tmp_path: Path) -> None:
    closers, services = [], []
    for index, num_open in enumerate((2, 3)):
        service, _ = make_service()
        service.admission = Admission()
        service.admission.num_requests = num_open
        services.append(service)
        closers.append(install(service, share_folder=str(tmp_path), index=index))
    for service in services:
        (load,) = ask(server_app.build_app(service), "/load")
        assert load.json() == {"server_load": 5}
    replacement, _ = make_service()
    replacement.admission = Admission()
    closers.append(install(replacement, share_folder=str(tmp_path), index=1))
    (load,) = ask(server_app.build_app(services[0]), "/load")
    assert load.json() == {"server_load": 2}
    for close in reversed(closers):
        close()


def test_deaths_of_the_engine_are_counted_once_and_each_process_tells_of_its_own_requests(tmp_path: Path) -> None:
    closers, services = [], []
    for index in range(2):
        service, _ = make_service()
        service.engine_events = EngineEvents()
        services.append(service)
        closers.append(install(service, share_folder=str(tmp_path), index=index))
    app = server_app.build_app(services[1])
    assert samples_of(*ask(app, "/metrics"))["octavo:engine_restarts_total"][0].value == 0, "shown before the first"
    for index, service in enumerate(services):
        service.engine_events.num_restarts += 1
        service.engine_events.num_replayed += 3 + index
        service.metrics._share.publish()
    found = samples_of(*ask(app, "/metrics"))
    assert found["octavo:engine_restarts_total"][0].value == 1
    assert found["octavo:requests_replayed_total"][0].value == 7
    for close in closers:
        close()


def test_timeline() -> None:
    service, engine = make_service()
    now = time.monotonic()
    timings = RequestTimings(queued_s=now, scheduled_s=now + 0.1)
    for tenant in ("default", "other"):
        engine.timelines.append(RequestTimeline(tenant, "running", tenant, time.time(), timings, 5, 0, 3))
    app = server_app.build_app(service)
    found, of_others, missing = ask(
        app, *(f"/v1/requests/{each}/timeline" for each in ("default", "other", "%1b%0amissing"))
    )
    assert found.status_code == 200
    events = found.json()["sequences"][0]["events"]
    assert [each["event"] for each in events] == ["arrived", "queued", "scheduled"]
    for refused in (of_others, missing):
        assert refused.status_code == 404 and refused.json()["error"]["code"] == "request_not_found"


def record(**more: Any) -> RequestRecord:
    now = time.monotonic()
    values: dict[str, Any] = {
        "request_id": "chatcmpl-1", "route": "/v1/chat/completions", "model": "fake", "tenant": "default",
        "num_prompt_tokens": 12, "num_cached_tokens": 4, "num_generation_tokens": 3, "finish_reasons": ("stop",),
        "params": SamplingParams(temperature=0.5, max_tokens=9),
        "stats": RequestStateStats(queued_ts=now - 1.9, scheduled_ts=now - 1.5, first_token_ts=now - 1),
        "received_s": now - 2, "finished_s": now,
    }  # fmt: skip
    return RequestRecord(**{**values, **more})


def test_spans_hang_below_the_clients_own() -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer("http://unused", SimpleSpanProcessor(exporter))
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def route() -> None:
        tracer.request_finished(record())

    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    ask(tracer.layer(app), "/v1/chat/completions", method="POST", headers={"traceparent": f"00-{trace}-{parent}-01"})
    ask(tracer.layer(app), "/v1/chat/completions", method="POST")
    below, alone = exporter.get_finished_spans()
    assert below.parent is not None and alone.parent is None
    assert (f"{below.context.trace_id:032x}", f"{below.parent.span_id:016x}") == (trace, parent)
    assert alone.context.trace_id != below.context.trace_id
    assert [event.name for event in alone.events] == ["queued", "scheduled", "first_token"]
    attributes = dict(alone.attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] == 12 and attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.latency.time_in_queue"] == pytest.approx(0.4)
    assert attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(1.0)
    assert alone.start_time is not None and alone.end_time is not None
    assert (alone.end_time - alone.start_time) / 1e9 == pytest.approx(2.0, abs=1e-3)
    assert abs(alone.end_time / 1e9 - time.time()) < 60
    tracer.close()


def test_a_failed_request_is_a_failed_span() -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer("http://unused", SimpleSpanProcessor(exporter))
    tracer.request_finished(record(stats=None, error_code="queue_full", finish_reasons=("abort",)))
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok and (span.attributes or {})["error.type"] == "queue_full"
    assert "octavo.num_preemptions" not in (span.attributes or {})


def test_spans_need_a_collector_and_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = make_service(otlp_traces_endpoint="localhost:4317")
    with pytest.raises(ConfigError, match=r"http\(s\) URL"):
        install(service)
    service, _ = make_service(otlp_traces_endpoint="http://localhost:4318/v1/traces")

    def fail(name: str) -> SimpleNamespace:
        raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry.sdk")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"octavo\[otel\]"):
        install(service)

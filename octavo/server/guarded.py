"""Puts an engine that comes back, admission, keys and limits into a Service: what ``octavo serve`` and tests share.

Holds no logic of its own.
"""

from __future__ import annotations

import functools
import logging

from octavo.config.server import ServerConfig
from octavo.engine.blame import RestartPolicy
from octavo.engine.replay import Launch
from octavo.engine.supervisor import EngineSupervisor, SupervisorOptions
from octavo.engine.watchdog import WatchSettings
from octavo.server.admission import Admission, limits_for
from octavo.server.auth import KeyCheck
from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import AdmissionLayer, BodyLimits
from octavo.server.service import Layer, Service

logger = logging.getLogger(__name__)


def supervise(
    service: Service, launch: Launch, *, log_stats: bool = False, index: int = 0, count: int = 1
) -> tuple[EngineSupervisor, Lifecycle]:
    """Give a service all that guards it. Nothing is started yet.

    Args:
        service: Gets its engine when that takes requests; admission, lifecycle and layers now.
        launch: Starts one engine process: ``octavo.engine.supervisor.launcher(args)``.
        log_stats: Whether to log throughput while the engine works.
        index: Which of several HTTP processes this is.
        count: How many there are: each lets in its share.
    """
    config = service.config
    admission = Admission()

    def on_ready() -> None:
        admission.limits = limits_for(supervisor.llm.ready.config.scheduler, count)
        service.engine = supervisor.llm  # outlives every engine process
        logger.info("Application startup complete.")  # scripts wait for this line

    def on_phase(phase: str) -> None:
        service.loading.phase = phase

    supervisor = EngineSupervisor(
        launch,
        SupervisorOptions(
            policy=RestartPolicy(max_deaths=config.max_engine_deaths),
            watch=watch_settings(config),
            log_stats=log_stats,
            client_index=index,
            on_phase=on_phase,
            on_ready=on_ready,
            on_failed=lambda error: lifecycle.on_engine_failed(error),
        ),
    )
    lifecycle = Lifecycle(supervisor, admission, config.shutdown_timeout)
    admission.refuse = lifecycle.refusal
    service.admission, service.lifecycle, service.engine_events = admission, lifecycle, supervisor.events
    service.layers += layers(config, admission)
    return supervisor, lifecycle


def layers(config: ServerConfig, admission: Admission) -> list[Layer]:
    """What stands in front of the routes, outermost first: a stranger's body is bounded, but it takes no room."""
    root_path, error_format = config.root_path or "", config.error_format
    return [
        functools.partial(BodyLimits, config=config, error_format=error_format),
        functools.partial(
            KeyCheck,
            keys=config.api_key,
            admin_keys=config.admin_api_key,
            root_path=root_path,
            error_format=error_format,
        ),
        functools.partial(AdmissionLayer, admission=admission, root_path=root_path, error_format=error_format),
    ]


def watch_settings(config: ServerConfig) -> WatchSettings:
    """The times of the watchdog."""
    return WatchSettings(
        unready_after_s=config.stall_timeout,
        dump_after_s=min(3 * config.stall_timeout, config.hang_timeout / 2),
        restart_after_s=config.hang_timeout,
    )

"""One server, put together and run: settings, engine, guards, metrics, routes, in the order in which they are needed.

Called by ``octavo serve``, and by each of several HTTP processes (``workers.py``). Holds no logic of its own.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import socket
from dataclasses import dataclass

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.heartbeat import DUMP_SIGNAL
from octavo.engine.replay import Launch
from octavo.engine.supervisor import launcher
from octavo.server import instruments, listen
from octavo.server.app import describe_routes, make_routes, with_layers
from octavo.server.chat_prompt import check_default_kwargs
from octavo.server.guarded import supervise
from octavo.server.lifecycle import Lifecycle
from octavo.server.service import Service
from octavo.utils.collector import Collector

logger = logging.getLogger(__name__)
WORKERS = "octavo.server.workers:serve"
"""Several HTTP processes in front of one engine."""
ATTACH_TIMEOUT_S = 10.0
"""How long a replacement waits for the engine that is there before it listens."""


def serve(args: EngineArgs, config: ServerConfig, prog: str) -> int:
    """Serve until a signal, or the end of the engine.

    Args:
        args: Of the engine.
        config: Of the server.
        prog: For the last line of a server that failed.

    Returns:
        The exit status.

    Raises:
        ConfigError: The address cannot be had, a file or a default is wrong, or a part that is asked for is not
            installed.
    """
    listen.check_tls(config)
    check_default_kwargs(config)
    if config.api_server_count > 1:
        module, _, function = WORKERS.partition(":")
        return int(getattr(importlib.import_module(module), function)(args, config, prog))
    listener = listen.bind(config)
    lifecycle = serve_here(config, launcher(args), listener, log_stats=args.disable_log_stats is not True)
    listen.report_failure(lifecycle, prog)
    return lifecycle.status


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a server's HTTP processes this is."""

    index: int = 0
    count: int = 1
    share_folder: str | None = None
    """Where they leave their numbers for each other; None for a single one."""
    is_replacement: bool = False
    """Another one was here: clients that connect need not hear that this one is loading, they wait a moment."""


def serve_here(
    config: ServerConfig, launch: Launch, listener: socket.socket, *, log_stats: bool, place: Place | None = None
) -> Lifecycle:
    """Be one HTTP process until its end.

    Args:
        config: Of the server.
        launch: Starts an engine process, or finds the one that all share.
        listener: From ``listen.bind``.
        log_stats: Whether to log throughput.
        place: Among several.

    Returns:
        How it ended.
    """
    place = place or Place()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    service = Service(config=config)
    supervisor, lifecycle = supervise(
        service, launch, log_stats=log_stats and place.index == 0, index=place.index, count=place.count
    )
    lifecycle.collector = collector = Collector(lambda: lifecycle.num_open)
    close_instruments = instruments.install(service, share_folder=place.share_folder, index=place.index)
    routes = make_routes(service)
    if place.index == 0 and not place.is_replacement:
        logger.info("Starting Octavo server on %s", listen.address_of(listener, config))
        logger.info("Available routes are:")
        for line in describe_routes(routes):
            logger.info("%s", line)
    collector.take_over()
    supervisor.start()
    if place.is_replacement:
        supervisor.wait_loaded(ATTACH_TIMEOUT_S)
    try:
        listen.run(with_layers(service, routes), config, lifecycle, listener)
    finally:
        supervisor.shutdown()
        close_instruments()
        service.close()
    return lifecycle

"""One server, put together and run: settings, engine, guards, metrics, routes, in the order in which they are needed.

Called by ``octavo serve``. Holds no logic of its own.
"""

from __future__ import annotations

import importlib
import logging

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.supervisor import launcher
from octavo.server import instruments, listen
from octavo.server.app import describe_routes, make_routes, with_layers
from octavo.server.guarded import supervise
from octavo.server.service import Service

logger = logging.getLogger(__name__)
WORKERS = "octavo.server.workers:serve"
"""Several HTTP processes in front of one engine."""


def serve(args: EngineArgs, config: ServerConfig, prog: str) -> int:
    """Serve until a signal, or the end of the engine.

    Args:
        args: Of the engine.
        config: Of the server.
        prog: For the last line of a server that failed.

    Returns:
        The exit status.

    Raises:
        ConfigError: The address cannot be had, or a part that is asked for is not installed.
    """
    if config.api_server_count > 1:
        module, _, function = WORKERS.partition(":")
        return int(getattr(importlib.import_module(module), function)(args, config, prog))
    listener = listen.bind(config)
    service = Service(config=config)
    supervisor, lifecycle = supervise(service, launcher(args), log_stats=args.disable_log_stats is not True)
    close_instruments = instruments.install(service)
    routes = make_routes(service)
    logger.info("Starting Octavo server on %s", listen.address_of(listener, config))
    logger.info("Available routes are:")
    for line in describe_routes(routes):
        logger.info("%s", line)
    supervisor.start()
    try:
        status = listen.run(with_layers(service, routes), config, lifecycle, listener)
    finally:
        supervisor.shutdown()
        close_instruments()
        service.close()
    listen.report_failure(lifecycle, prog)
    return status

"""The server's application over an engine of its own, for ``octavo run-batch``: all routes, no socket.

There are no limits but the engine's. An engine that dies is started again and goes on; a request that kills it twice is
given up.
"""

from __future__ import annotations

import threading

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.supervisor import EngineSupervisor, SupervisorOptions
from octavo.errors import OctavoError
from octavo.server.app import build_app
from octavo.server.service import ASGIApp, Service


class EngineApp:
    """See ``run_batch.RunningApp``.

    Args:
        args: What was asked for.

    Raises:
        OctavoError: The engine cannot start.
    """

    def __init__(self, args: EngineArgs) -> None:
        is_settled = threading.Event()
        failures: list[OctavoError] = []

        def on_failed(error: OctavoError) -> None:
            failures.append(error)
            is_settled.set()

        options = SupervisorOptions(
            log_stats=args.disable_log_stats is False, on_ready=is_settled.set, on_failed=on_failed
        )
        self._engine = EngineSupervisor.from_engine_args(args, options)
        self._engine.start()
        try:
            is_settled.wait()
        except BaseException:
            self._engine.shutdown()
            raise
        if failures:
            raise failures[0]
        service = Service(config=ServerConfig())
        service.engine = self._engine.llm
        self._app = build_app(service)

    @property
    def app(self) -> ASGIApp:
        """Takes requests."""
        return self._app

    @property
    def max_concurrency(self) -> int:
        """The rows of the engine, and half as many waiting: admission never stands still for want of a row."""
        scheduler = self._engine.llm.ready.config.scheduler
        return max(1, min(scheduler.max_num_seqs * 3 // 2, scheduler.max_num_queued_reqs))

    def close(self) -> None:
        """End the engine."""
        self._engine.shutdown()

"""uvicorn around the application: sockets bound before anything is loaded, our limits, our signals, our exit status.

The only module that starts a web server. What signals mean is ``lifecycle.py``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server.lifecycle import Lifecycle, first_line
from octavo.server.protocol import limits_of, make_protocol
from octavo.utils.logging import ROOT

logger = logging.getLogger(__name__)
BACKLOG = 16384
"""Connections that wait to be accepted; the system's own limit is lower. A client that finds no place tries again in a
second at the earliest."""
ACCEPTS_PER_TURN = 16
"""uvloop accepts one connection per listener in a turn of the loop, so a burst of them would wait for as many turns: it
gets this many handles of the one listener."""
CLOSE_TIMEOUT_S = 5
"""How long connections get to close once the last request is done."""


def check_tls(config: ServerConfig) -> None:
    """Try the key and the certificate before anything is loaded.

    Raises:
        ConfigError: One of the files cannot be used; ``param`` names the setting.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path: str | None = getattr(config, name)
        try:
            if path is not None:
                Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} is {path!r}, which cannot be read: {error.strerror}", param=name) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a word for a key under a password: nobody sits at a server's terminal to type one.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"ssl_keyfile is {config.ssl_keyfile!r} and ssl_certfile {config.ssl_certfile!r}, which are no key without "
            f"a password and its certificate, both in PEM format: {error}",
            param="ssl_keyfile",
        ) from None
    try:
        context.load_verify_locations(config.ssl_ca_certs or config.ssl_certfile)
    except ssl.SSLError as error:
        raise ConfigError(
            f"ssl_ca_certs is {config.ssl_ca_certs!r}, which has no certificates in PEM format: {error}",
            param="ssl_ca_certs",
        ) from None


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket, before the model is loaded: a port in use is better told at once.

    Raises:
        ConfigError: It cannot be had; ``param`` names the setting.
    """
    return bind_several(config, 1)[0]


def bind_several(config: ServerConfig, count: int) -> list[socket.socket]:
    """Listening sockets of one address among which the system spreads connections; a single one for a Unix socket.

    Raises:
        ConfigError: It cannot be had; ``param`` names the setting.
    """
    if config.uds is not None:
        return [_bind_path(config.uds)]
    # Without the option a second server on the port is refused, so it is set only where it is needed.
    first = _bind_port(config, config.port, is_shared=count > 1)
    port = first.getsockname()[1]
    return [first, *(_bind_port(config, port, is_shared=True) for _ in range(count - 1))]


def _bind_port(config: ServerConfig, port: int, *, is_shared: bool) -> socket.socket:
    host = config.host or "0.0.0.0"  # noqa: S104 - the documented default
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port is {config.port}, but it is in use: choose another", param="port") from None
        what = "port" if error.errno == errno.EACCES else "host"
        raise ConfigError(
            f"{host}:{config.port} cannot be listened on: {error.strerror or error}", param=what
        ) from None
    listener.listen(BACKLOG)
    return listener


def _bind_path(path: str) -> socket.socket:
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)  # left over by a server before
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds is {path!r}, which cannot be listened on: {error.strerror}", param="uds") from None
    listener.listen(BACKLOG)
    return listener


def address_of(listener: socket.socket, config: ServerConfig) -> str:
    """Where clients find the server, for the log."""
    if config.uds is not None:
        return f"unix socket {config.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class WebServer(uvicorn.Server):
    """uvicorn with our signals and without its own exit.

    Args:
        config: For uvicorn.
        lifecycle: Hears of signals, and stops the server.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; the lifecycle may stop the server from now on."""
        await super().startup(sockets)
        self._lifecycle.attach(self, asyncio.get_running_loop())

    def stop(self, *, at_once: bool) -> None:
        """See ``lifecycle.Stoppable``."""
        self.force_exit = self.force_exit or at_once
        self.should_exit = True
        if at_once:
            for connection in list(self.server_state.connections):
                transport: Any = getattr(connection, "transport", None)
                if transport is not None:
                    transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGINT and SIGTERM go to the lifecycle, and are not raised again at the end."""

        def on_signal(number: int, _frame: FrameType | None) -> None:
            self._lifecycle.on_signal(number)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class WithoutQuery(logging.Filter):
    """Takes the query out of lines of the access log: no route reads one, and clients put keys there by mistake."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, version, status = record.args
            record.args = (client, method, str(path).partition("?")[0], version, status)
        return True


def web_config(app: Any, config: ServerConfig, is_full: Callable[[int], bool] = lambda _: False) -> uvicorn.Config:
    """uvicorn's settings that ours mean.

    Args:
        app: ASGI application.
        config: Of the server.
        is_full: Whether there is no room for a request that stands behind so many others.
    """
    uvicorn_logger = logging.getLogger("uvicorn")
    uvicorn_logger.handlers = list(logging.getLogger(ROOT).handlers)
    uvicorn_logger.propagate = False
    access_log = logging.getLogger("uvicorn.access")
    access_log.filters = [WithoutQuery()]
    return uvicorn.Config(
        app,
        loop="auto",
        http=make_protocol(
            limits_of(config, config.error_format, shows_request_ids=config.enable_request_id_headers), is_full
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=config.uvicorn_log_level,
        access_log=not config.disable_uvicorn_access_log,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.keep_alive_timeout,  # pyright: ignore[reportArgumentType] - a float does as well
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )


def run(app: Any, config: ServerConfig, lifecycle: Lifecycle, listener: socket.socket) -> int:
    """Serve until a signal, or the end of the engine.

    Args:
        app: ASGI application.
        config: Of the server.
        lifecycle: Decides when it is over.
        listener: From ``bind``.

    Returns:
        The exit status. After a failure of the engine its cause is the last line on standard error.
    """
    server = WebServer(web_config(app, config, lifecycle.is_full), lifecycle)
    logger.info("Uvicorn running on %s (Press CTRL+C to quit)", address_of(listener, config))
    handles = [listener, *(listener.dup() for _ in range(ACCEPTS_PER_TURN - 1))]
    try:
        server.run(sockets=handles)
    finally:
        for each in handles:
            each.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)
    return lifecycle.status


def report_failure(lifecycle: Lifecycle, prog: str) -> None:
    """The cause as the last line, once everything else has been said."""
    if lifecycle.failure is not None:
        sys.stderr.write(f"{prog}: error: {first_line(lifecycle.failure)}\n")
        sys.stderr.flush()

"""GuardConfig: what protects the server from its clients, and how it ends. The part of ``ServerConfig`` that the layers
in front of the routes and the lifecycle read.

Knows no HTTP library and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config.setting import setting

KEYS, LIMITS, LIFE = "Keys", "Limits on requests", "Life of the server"
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Keys, limits, and times. Checked with the rest of ``ServerConfig``."""

    api_key: tuple[str, ...] = setting(
        (), "names", KEYS,
        "Key or keys, one of which every request must bring as a bearer token, health checks aside. Also from the "
        "environment variable OCTAVO_API_KEY, where it does not show in process lists.",
    )  # fmt: skip
    admin_api_key: tuple[str, ...] = setting(
        (), "names", KEYS,
        "Key or keys for the routes that change the server (reset_prefix_cache and the like). Without one there are no "
        "such routes. Also from OCTAVO_ADMIN_API_KEY.",
    )  # fmt: skip
    max_request_bytes: int = setting(
        64 * 2**20, "count", LIMITS, "Longest body of a request.", low=1, high=2**40,
    )  # fmt: skip
    max_header_bytes: int = setting(
        64 * 2**10, "count", LIMITS, "Longest head of a request: its first line and all headers.", low=1024, high=2**26
    )
    max_header_count: int = setting(100, "count", LIMITS, "Most headers of a request.", low=8, high=65536)
    header_timeout: float = setting(
        10.0, "number", LIMITS, "Seconds for a connection to send the head of a request.", low=0, above_low=True
    )
    body_timeout: float = setting(
        60.0, "number", LIMITS, "Seconds for a request's body to arrive.", low=0, above_low=True
    )
    keep_alive_timeout: float = setting(
        60.0, "number", LIMITS, "Seconds that a connection may rest between two requests.", low=0, above_low=True
    )
    max_connections: int | None = setting(
        None, "count", LIMITS,
        "Most open connections; further ones are told to come back. Default: what the limit on open files allows.",
        low=1, high=INT32_MAX, optional=True,
    )  # fmt: skip
    shutdown_timeout: float = setting(
        30.0, "number", LIFE,
        "Seconds that open requests get to finish after SIGTERM or Ctrl-C; 0 ends them at once. A second signal does "
        "the same.",
        low=0,
    )  # fmt: skip
    max_engine_deaths: int = setting(
        3, "count", LIFE,
        "So many ends of the engine within ten minutes end the server; after fewer it is started again and open "
        "requests go on. 1: never started again.",
        low=1, high=1000,
    )  # fmt: skip
    stall_timeout: float = setting(
        10.0, "number", LIFE,
        "Seconds without a finished step, while requests wait, until the server says that it is not ready. A third of "
        "what it takes until the stacks of all processes are logged.",
        low=0, above_low=True,
    )  # fmt: skip
    hang_timeout: float = setting(
        120.0, "number", LIFE, "Seconds without a finished step, while requests wait, until the engine is restarted.",
        low=0, above_low=True,
    )  # fmt: skip
    api_server_count: int = setting(1, "count", LIFE, "HTTP processes in front of the engine.", low=1, high=256)

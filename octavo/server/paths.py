"""What a path is for, to those who decide before routing: health, administration, work for the engine.

Always the path that will be routed (``scope["path"]``), never one made of headers: whoever decides on another path than
the router can be steered around.
"""

from __future__ import annotations

from typing import Any

HEALTH = frozenset({"/health", "/health/live", "/health/ready", "/livez", "/readyz", "/ping"})
"""Open to everybody: they say nothing but how the server is."""
ADMIN = frozenset(
    {
        "/reset_prefix_cache",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/pause",
        "/resume",
        "/is_paused",
        "/start_profile",
        "/stop_profile",
        "/collective_rpc",
        "/update_weights",
        "/server_info",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
"""Routes that change or show the server itself, those that other engines have included: none of them is ever open."""
_UNCOUNTED = ("/abort", "/cancel")


def routed_path(scope: dict[str, Any], root_path: str = "") -> str:
    """The path that the application's router looks up, by its own rule.

    Args:
        scope: Of the request.
        root_path: Prefix that the application strips, where the path has it.
    """
    path: str = scope["path"]
    prefix: str = root_path or scope.get("root_path", "")
    if prefix and path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == "/"):
        return path[len(prefix) :]
    return path


def is_admin(path: str) -> bool:
    """Whether a path needs the administrator's key; slashes at the end and doubled ones do not help."""
    return "/" + "/".join(part for part in path.split("/") if part) in ADMIN


def is_counted(method: str, path: str) -> bool:
    """Whether a request takes room in the queue: it makes the engine or a tokenizer work."""
    return method == "POST" and path not in HEALTH and not is_admin(path) and not path.endswith(_UNCOUNTED)
